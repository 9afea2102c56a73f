"""Sliding windows of token ids and their targets."""

import numpy as np
import pytest

from gptjax.data.windows import count, windows
from gptjax.errors import UserError


@pytest.mark.parametrize("n", [2, 5, 6, 7, 20])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 7])
def test_windows_are_slices_and_targets_are_shifted(n, stride):
    ids, length = np.arange(n) * 10, min(4, n - 1)
    inputs, targets = windows(ids, length, stride)
    expected = range(0, n - length, stride)
    assert len(inputs) == len(expected) == count(n, length, stride)
    for row, start in enumerate(expected):
        assert inputs[row].tolist() == ids[start : start + length].tolist()
        assert targets[row].tolist() == ids[start + 1 : start + length + 1].tolist()


def test_drop_last_false_reaches_the_last_token():
    assert windows(range(8), 3, 3)[1].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert windows(range(8), 3, 3, drop_last=False)[1].tolist() == [[1, 2, 3], [4, 5, 6], [5, 6, 7]]
    assert windows(range(7), 3, 3, drop_last=False)[1].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_too_few_tokens_and_invalid_strides():
    with pytest.raises(UserError, match="4 tokens, and one window of 4 needs at least 5"):
        windows(range(4), 4, 1)
    with pytest.raises(UserError, match="at least 1"):
        windows(range(9), 4, 0)
