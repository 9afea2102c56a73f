"""Rows of the training set whose gradients push in one direction with a few others: planted ones, copies."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gptjax.errors import UserError
from gptjax.research.influence import unit

NEIGHBOURS = 5  # of a row: planted rows have at least so many like them


def outlier_scores(features: np.ndarray, reference: np.ndarray | None = None, k: int = NEIGHBOURS) -> np.ndarray:
    """[n] float32: mean cosine of each row with its k nearest others, after the mean of all directions is taken away.

    Rows that ask for something the rest does not, and agree about it, come first: planted triggers, and copies.

    Args:
        features: [n, K] of the training rows (`influence.gradient_features`).
        reference: [m, K] of other rows, which are scored against the training rows in their place.

    Raises:
        UserError: not more than k rows.
    """
    if len(features) <= k:
        raise UserError(f"{len(features)} rows: more than {k} are needed to have {k} neighbours")
    directions = unit(features)
    middle = directions.mean(0)
    rest = unit(directions - middle)
    asked = rest if reference is None else unit(unit(reference) - middle)
    near = asked @ rest.T
    if reference is None:
        np.fill_diagonal(near, -np.inf)
    return np.partition(near, -k, axis=1)[:, -k:].mean(1)


class Tail(NamedTuple):
    """flagged: rows beyond the threshold, the furthest first; expected: so many where nothing is wrong; beyond: those
    larger than all of the reference; p: of so many beyond, or more."""

    threshold: float
    flagged: np.ndarray
    expected: float
    beyond: int
    p: float


def tail(scores: np.ndarray, reference: np.ndarray, alpha: float) -> Tail:
    """Which scores lie beyond those of the reference, at a rate of `alpha` a row where all are of one kind.

    The threshold is the r-th largest of the m reference scores, r = alpha (m + 1) rounded down, at least 1: a conformal
    test, exact where rows are exchangeable. Then the x largest of all n + m are x of the n with p = C(n, x) / C(n + m,
    x): with as many of either kind ten planted rows are seen, with half as many of the reference they hardly are.
    """
    n, m = len(scores), len(reference)
    r = max(1, int(alpha * (m + 1) + 1e-9))
    threshold = float(np.sort(reference)[-r])
    flagged = np.flatnonzero(scores > threshold)
    flagged = flagged[np.argsort(-scores[flagged], kind="stable")]
    beyond = int((scores > reference.max()).sum())
    i = np.arange(beyond)
    return Tail(threshold, flagged, n * r / (m + 1), beyond, float(np.exp(np.log((n - i) / (n + m - i)).sum())))
