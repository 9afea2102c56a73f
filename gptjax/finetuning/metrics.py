"""How good a classifier is, in numbers that say how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def confusion(labels: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """[n_classes, n_classes] int: row the true class, column the predicted one."""
    table = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(table, (labels, predicted), 1)
    return table


def f1(table: np.ndarray) -> np.ndarray:
    """[n_classes]: of each class, 2 tp / (2 tp + fp + fn); 0 where it is neither there nor predicted."""
    right = np.diag(table)
    return 2 * right / np.maximum(table.sum(0) + table.sum(1), 1)


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: |accuracy - confidence|, averaged over equal bins of confidence with their sizes.
    Source: arXiv:1706.04599, eq. 3."""
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    where = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(right[where == b].mean() - confidence[where == b].mean()) * (where == b).sum() for b in set(where)]
    return float(sum(gaps) / len(labels))


def interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share (Wilson 1927)."""
    p, s = right / n, z * z / n
    middle, half = (p + s / 2) / (1 + s), z * math.sqrt(p * (1 - p) / n + s / (4 * n)) / (1 + s)
    return middle - half, middle + half


def t_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean, and both ends of its 95 % interval by Student's t; None of a single value."""
    from scipy import stats

    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, None, None
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return mean, mean - half, mean + half


def report(probabilities: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """All of them. probabilities [n, C], labels [n]."""
    table = confusion(labels, probabilities.argmax(-1), len(names))
    right, n = int(np.trace(table)), len(labels)
    return {
        "n": n,
        "accuracy": right / n,
        "accuracy_interval": list(interval(right, n)),
        "f1": dict(zip(names, f1(table).tolist(), strict=True)),
        "macro_f1": float(f1(table).mean()),
        "calibration_error": calibration_error(probabilities, labels),
        "confusion": table.tolist(),
        "labels": list(names),
    }
