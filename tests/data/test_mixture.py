import numpy as np
import pytest

from gptjax.data.mixture import assign, shares
from gptjax.errors import UserError


def test_example_of_the_docstring():
    source, number = assign(np.arange(8), np.array([0.5, 0.25, 0.25]))
    assert source.tolist() == [2, 0, 1, 0, 2, 0, 1, 0]
    assert number.tolist() == [0, 0, 0, 1, 1, 2, 1, 3]


@pytest.mark.parametrize("p", [[1.0], [0.3, 0.7], [1 / 3] * 3, [0.9, 0.0, 0.1], [0.01, 0.29, 0.2, 0.5]])
def test_proportions_hold_and_counts_count(p):
    source, number = assign(np.arange(5000), np.array(p))
    seen = [0] * len(p)
    for i, (k, c) in enumerate(zip(source, number, strict=True)):
        assert c == seen[k]
        seen[k] += 1
        assert all(abs(n - (i + 1) * share) < len(p) for n, share in zip(seen, p, strict=True))


def test_far_away_samples_need_no_history():
    p = np.array([0.3, 0.5, 0.2])
    near = assign(np.arange(10**9, 10**9 + 100), p)
    alone = [assign(np.array([i]), p) for i in range(10**9, 10**9 + 100)]
    assert near[0].tolist() == [int(s[0]) for s, _ in alone]
    assert near[1].tolist() == [int(n[0]) for _, n in alone]
    for k in range(3):  # and the numbers of each source go on without a gap
        mine = near[1][near[0] == k]
        assert (np.diff(mine) == 1).all()


def test_temperature_flattens():
    assert shares([3, 1]).tolist() == [0.75, 0.25]
    assert shares([9, 1, 0], 0.5).tolist() == [0.75, 0.25, 0.0]
    assert shares([9, 1, 0], 0.0).tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("weights", [[0, 0], [-1, 2], [float("nan"), 1]])
def test_impossible_weights(weights):
    with pytest.raises(UserError, match=r"data\.weights"):
        shares(weights)
