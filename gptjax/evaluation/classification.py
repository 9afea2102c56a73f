"""Computes metrics of a classifier: accuracy with a confidence interval, F1, calibration error and confusion matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from gptjax.evaluation.intervals import interval


def confusion(labels: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """Returns the confusion matrix [n_classes, n_classes] int64. The rows of the confusion matrix are the true classes,
    and the columns are the predicted classes."""
    table = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(table, (labels, predicted), 1)
    return table


def f1(table: np.ndarray) -> np.ndarray:
    """Returns the F1 score of each class, [n_classes], from a confusion matrix: 2 tp / (2 tp + fp + fn).

    tp, fp and fn are the numbers of true positives, false positives and false negatives of the class. The F1 score of a
    class that neither occurs nor is predicted is 0.
    """
    correct = np.diag(table)
    return 2 * correct / np.maximum(table.sum(0) + table.sum(1), 1)


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Returns the expected calibration error: the mean of |accuracy - confidence| over bins of equal width.

    Predictions are grouped into bins by their confidence, and each bin is weighted by the number of its predictions.
    Source: arXiv:1706.04599, eq. 3.
    """
    confidence, correct = probabilities.max(-1), probabilities.argmax(-1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(correct[bin_of == b].mean() - confidence[bin_of == b].mean()) * (bin_of == b).sum() for b in set(bin_of)
    ]
    return float(sum(gaps) / len(labels))


def report(probabilities: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns all metrics of a classifier for the class probabilities [n, C] and labels [n] of n texts, as a dict that
    can be written as JSON."""
    table = confusion(labels, probabilities.argmax(-1), len(names))
    correct, n = int(np.trace(table)), len(labels)
    return {
        "n": n,
        "accuracy": correct / n,
        "accuracy_interval": list(interval(correct, n)),
        "f1": dict(zip(names, f1(table).tolist(), strict=True)),
        "macro_f1": float(f1(table).mean()),
        "calibration_error": calibration_error(probabilities, labels),
        "confusion": table.tolist(),
        "labels": list(names),
    }
