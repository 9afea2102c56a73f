"""How sure a number is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def interval(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
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
