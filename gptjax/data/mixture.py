"""Mixes several data sources by computing in closed form the source from which the i-th window of a run is read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gptjax.errors import UserError


def shares(weights: Sequence[float] | np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Returns sampling probabilities p_i proportional to w_i ** temperature, where w_i is the weight of source i, [n]
    float64. A weight of 0 gives p_i = 0.

        temperature  1: p is proportional to the weights; 0: p is uniform; between 0 and 1: sources with small weights
                     get a larger p than with temperature 1.

    Source: the exponent alpha of multilingual sampling, arXiv:1911.02116, section 3.1.
    """
    weights = np.asarray(weights, np.float64)
    if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise UserError(f"data.weights must be numbers >= 0 and not all 0, got {weights.tolist()}")
    p = np.where(weights > 0, np.power(weights, temperature, where=weights > 0, out=np.zeros_like(weights)), 0.0)
    return p / p.sum()


def assign(samples: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the data source of each sample, and the index of the sample within that source, both [n] int64.

    The array `samples` holds indices of windows in a run, and p[k] is the probability of source k. A Beatty sequence
    assigns exactly floor(i p[0]) of the first i samples to source 0. The samples that do not belong to source 0 are
    renumbered, and further Beatty sequences divide them among the other sources. Among the first i samples, the number
    of samples of source k, which has the probability p[k], differs from i p[k] by less than the number of sources. The
    data source of a sample is computed without iterating over earlier samples.

        p .5 .25 .25    samples  0 1 2 3 4 5 6 7
                        source   2 0 1 0 2 0 1 0
                        index    0 0 0 1 1 2 1 3
    """
    samples = np.asarray(samples, np.int64)
    source = np.full(samples.shape, -1, np.int64)
    index = samples.copy()  # index of each sample among the samples that have no source yet
    remaining = 1.0
    last = int(np.flatnonzero(p)[-1])
    for k in np.flatnonzero(p):
        share = 1.0 if k == last else min(p[k] / remaining, 1.0)
        before = np.floor(index * share).astype(np.int64)
        unassigned = source < 0
        taken = unassigned & (np.floor((index + 1) * share).astype(np.int64) > before)
        source[taken] = k
        index = np.where(taken, before, np.where(unassigned, index - before, index))
        remaining -= p[k]
    return source, index
