"""Computes confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def interval(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Returns Wilson's confidence interval (Wilson 1927) of the proportion successes / n; z = 1.96 gives the 95 %
    interval."""
    p, s = successes / n, z * z / n
    center, half_width = (p + s / 2) / (1 + s), z * math.sqrt(p * (1 - p) / n + s / (4 * n)) / (1 + s)
    return center - half_width, center + half_width


def t_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Returns (mean, lower, upper): the mean of the values, and the 95 % confidence interval of the mean by Student's t
    distribution.

    If there is only one value, lower and upper are None.
    """
    from scipy import stats

    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, None, None
    half_width = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return mean, mean - half_width, mean + half_width
