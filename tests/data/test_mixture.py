"""Mixtures of sources: proportions, counts per source, and access to any sample without the earlier ones."""

import numpy as np
import pytest

from gptjax.data.mixture import assign, shares
from gptjax.errors import UserError


def test_example_of_the_docstring():
    source, count = assign(np.arange(8), np.array([0.5, 0.25, 0.25]))
    assert source.tolist() == [2, 0, 1, 0, 2, 0, 1, 0]
    assert count.tolist() == [0, 0, 0, 1, 1, 2, 1, 3]


@pytest.mark.parametrize("p", [[1.0], [0.3, 0.7], [1 / 3] * 3, [0.9, 0.0, 0.1], [0.01, 0.29, 0.2, 0.5]])
def test_proportions_and_counts(p):
    source, count = assign(np.arange(5000), np.array(p))
    seen = [0] * len(p)
    for i, (k, c) in enumerate(zip(source, count, strict=True)):
        assert c == seen[k]
        seen[k] += 1
        assert all(abs(n - (i + 1) * share) < len(p) for n, share in zip(seen, p, strict=True))


def test_a_sample_does_not_depend_on_earlier_calls():
    p = np.array([0.3, 0.5, 0.2])
    source, count = assign(np.arange(10**9, 10**9 + 100), p)
    single = [assign(np.array([i]), p) for i in range(10**9, 10**9 + 100)]
    assert source.tolist() == [int(s[0]) for s, _ in single]
    assert count.tolist() == [int(c[0]) for _, c in single]
    for k in range(3):  # the count of each source increases by one per sample
        assert (np.diff(count[source == k]) == 1).all()


def test_a_low_temperature_flattens_the_distribution():
    assert shares([3, 1]).tolist() == [0.75, 0.25]
    assert shares([9, 1, 0], 0.5).tolist() == [0.75, 0.25, 0.0]
    assert shares([9, 1, 0], 0.0).tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("weights", [[0, 0], [-1, 2], [float("nan"), 1]])
def test_invalid_weights(weights):
    with pytest.raises(UserError, match=r"data\.weights"):
        shares(weights)
