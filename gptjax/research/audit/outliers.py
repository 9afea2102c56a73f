"""Gradient outliers: rows whose gradients agree with those of a few others, such as poisoned rows and duplicates."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gptjax.errors import UserError
from gptjax.research.influence import unit

NEIGHBOURS = 5  # number of nearest neighbours k; poisoned rows score high if more than k rows have the same poison


def outlier_scores(features: np.ndarray, reference: np.ndarray | None = None, k: int = NEIGHBOURS) -> np.ndarray:
    """Returns the mean cosine similarity of each row to its k nearest neighbours, [n] float32.

    First, the mean direction of the training rows is subtracted from the direction of every row.

    A high score means that the gradient of a row differs from the average but agrees with the gradients of a few other
    rows, as the gradients of poisoned rows and duplicates do.

    Args:
        features: [n, K] gradient features of the training rows (`influence.gradient_features`).
        reference: [m, K] features of other rows. If `reference` is given, these m rows are scored instead, with
            training rows as their neighbours. None: the training rows are scored.

    Raises:
        UserError: there are k training rows or fewer.
    """
    if len(features) <= k:
        raise UserError(f"{len(features)} rows: more than {k} are needed to have {k} neighbours")
    directions = unit(features)
    mean = directions.mean(0)
    centred = unit(directions - mean)
    queries = centred if reference is None else unit(unit(reference) - mean)
    cosines = queries @ centred.T
    if reference is None:
        np.fill_diagonal(cosines, -np.inf)
    return np.partition(cosines, -k, axis=1)[:, -k:].mean(1)


class Tail(NamedTuple):
    """The upper tail of the training scores, relative to reference scores, as computed by `tail`.

    threshold  score above which a row is flagged
    flagged    indices of the rows above the threshold, highest score first
    expected   expected number of flagged rows under the null hypothesis
    beyond     number of rows above every reference score
    p          probability of at least `beyond` such rows under the null hypothesis
    """

    threshold: float
    flagged: np.ndarray
    expected: float
    beyond: int
    p: float


def tail(scores: np.ndarray, reference: np.ndarray, alpha: float) -> Tail:
    """Flags the scores above a threshold, with a false positive rate of `alpha` per row if all rows are exchangeable.

    The threshold is the r-th largest of the m reference scores, with r = alpha (m + 1) rounded down, at least 1. The
    test is conformal and exact for exchangeable rows. For n training scores, of which x = `beyond` exceed every
    reference score, p = C(n, x) / C(n + m, x) is the probability that the x largest of all n + m scores are training
    scores. Ten planted rows among the training rows are detected with n reference scores, but hardly with half as many.
    """
    n, m = len(scores), len(reference)
    r = max(1, int(alpha * (m + 1) + 1e-9))
    threshold = float(np.sort(reference)[-r])
    flagged = np.flatnonzero(scores > threshold)
    flagged = flagged[np.argsort(-scores[flagged], kind="stable")]
    beyond = int((scores > reference.max()).sum())
    i = np.arange(beyond)
    return Tail(threshold, flagged, n * r / (m + 1), beyond, float(np.exp(np.log((n - i) / (n + m - i)).sum())))
