"""Which corpus the i-th window of a run comes from, in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gptjax.errors import UserError


def shares(weights: Sequence[float] | np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities p_i ~ w_i ** temperature, [n] float64, sum 1. A weight of 0 stays 0.

    temperature  1: as the weights say; 0: all alike; between: small corpora are drawn more often.
    Source: alpha of multilingual sampling, arXiv:1911.02116, section 3.1.
    """
    weights = np.asarray(weights, np.float64)
    if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise UserError(f"data.weights must be numbers >= 0 and not all 0, got {weights.tolist()}")
    p = np.where(weights > 0, np.power(weights, temperature, where=weights > 0, out=np.zeros_like(weights)), 0.0)
    return p / p.sum()


def assign(samples: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Source of each sample, and how many earlier samples that source had: both [n] int64.

    A Beatty sequence: of the first i samples exactly floor(i p) belong to a source of share p. The others
    are numbered anew and divided the same way, so the counts never drift (at most one a level) and any
    sample is found without walking through those before it.

        p .5 .25 .25    samples  0 1 2 3 4 5 6 7
                        source   2 0 1 0 2 0 1 0
                        count    0 0 0 1 1 2 1 3
    """
    samples = np.asarray(samples, np.int64)
    source = np.full(samples.shape, -1, np.int64)
    number = samples.copy()  # among the samples that no source has taken yet
    left = 1.0
    last = int(np.flatnonzero(p)[-1])
    for k in np.flatnonzero(p):
        part = 1.0 if k == last else min(p[k] / left, 1.0)
        before = np.floor(number * part).astype(np.int64)
        open_ = source < 0
        mine = open_ & (np.floor((number + 1) * part).astype(np.int64) > before)
        source[mine] = k
        number = np.where(mine, before, np.where(open_, number - before, number))
        left -= p[k]
    return source, number
