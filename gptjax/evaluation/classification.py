"""How good a classifier is, in numbers that say how sure they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from gptjax.evaluation.intervals import interval


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
