"""Finds training rows with outlier gradients, such as poisoned rows and duplicates.

The gradient of an outlier differs from the gradients of most rows, but is similar to the gradients of a few other rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gptjax.errors import UserError
from gptjax.research.influence import unit

# NEIGHBOURS is the default number k of nearest neighbours. Poisoned rows have high outlier scores if more than k rows
# are poisoned, because all k nearest neighbours of a poisoned row can then be poisoned rows.
NEIGHBOURS = 5


def outlier_scores(features: np.ndarray, reference: np.ndarray | None = None, k: int = NEIGHBOURS) -> np.ndarray:
    """Returns the mean cosine similarity of each row's gradient to its k nearest neighbours, [n] float32.

    The nearest neighbours of a row are the k other training rows with the most similar gradients. Before the cosine
    similarities are computed, each gradient is normalised to length 1, and the mean of the normalised training
    gradients is subtracted.

    A high outlier score means that the gradient of a row differs from the average gradient, but is similar to the
    gradients of a few other rows. Poisoned rows and duplicates have high outlier scores.

    Args:
        features: gradient features of the n training rows, K numbers per row, [n, K]
            (`influence.gradient_features`).
        reference: gradient features of m other rows, [m, K]. These rows are scored instead of the training rows, and
            the result has shape [m]. None: the training rows are scored.

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
    """The result of the function `tail`, which flags training rows with higher outlier scores than reference rows.

    Attributes:
        threshold: score above which a row is flagged.
        flagged: indices of the rows with scores above the threshold, highest score first.
        expected: expected number of flagged rows under the null hypothesis.
        beyond: number of training rows with scores above every reference score.
        p: probability, under the null hypothesis, that at least `beyond` training scores exceed every reference score.
    """

    threshold: float
    flagged: np.ndarray
    expected: float
    beyond: int
    p: float


def tail(scores: np.ndarray, reference: np.ndarray, alpha: float) -> Tail:
    """Flags training rows whose outlier scores exceed a threshold with a false positive rate of about `alpha` per row.

    The threshold is the r-th largest of the m reference scores, where r is alpha (m + 1) rounded down, but at least 1.
    If the threshold is the r-th largest of m reference scores and all rows are exchangeable, the false positive rate
    per row is r / (m + 1), which exceeds `alpha` only if alpha (m + 1) < 1.

    The p-value is computed by a conformal test, and is exact if all rows are exchangeable. If x of the n training
    scores exceed every one of the m reference scores, the p-value is C(n, x) / C(n + m, x), the probability that the x
    largest of all n + m scores are training scores.

    To detect a small number of planted rows, use about as many reference scores (m) as training scores (n): for 10
    planted rows and large n, the p-value is about 2^-10 = 0.001 with m = n, but (2/3)^10 = 0.017 with m = n / 2.
    """
    n, m = len(scores), len(reference)
    r = max(1, int(alpha * (m + 1) + 1e-9))
    threshold = float(np.sort(reference)[-r])
    flagged = np.flatnonzero(scores > threshold)
    flagged = flagged[np.argsort(-scores[flagged], kind="stable")]
    beyond = int((scores > reference.max()).sum())
    i = np.arange(beyond)
    return Tail(threshold, flagged, n * r / (m + 1), beyond, float(np.exp(np.log((n - i) / (n + m - i)).sum())))
