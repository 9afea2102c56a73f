"""Cuts token ids into sliding windows of inputs and next-token targets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gptjax.errors import UserError


def count(n_tokens: int, length: int, stride: int) -> int:
    """Returns the number of windows of `length` + 1 tokens in `n_tokens` tokens, if a window starts every `stride`
    tokens."""
    return len(range(0, n_tokens - length, stride))


def windows(
    ids: Sequence[int] | np.ndarray, length: int, stride: int, drop_last: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Cut `ids` [N] into n windows, and return their inputs and targets, each [n, length].

        ids        40 367 2885 1464 1807 3619     length 4, stride 1
        inputs   [[40, 367, 2885, 1464], [367, 2885, 1464, 1807]]
        targets  [[367, 2885, 1464, 1807], [2885, 1464, 1807, 3619]]

    If `drop_last` is False and tokens remain after the last window, one more window of full length is added, which ends
    at the last token and overlaps the previous window. Unless an additional window was added, the two returned arrays
    are read-only, and are views of `ids` if `ids` is an array.

    Raises:
        UserError: there are fewer than length + 1 ids, or length or stride is below 1.
    Source: "Build a Large Language Model (From Scratch)", chapter 2.6.
    """
    if length < 1 or stride < 1:
        raise UserError(f"length ({length}) and stride ({stride}) of windows must be at least 1")
    ids = np.asarray(ids)
    if len(ids) <= length:
        raise UserError(f"{len(ids)} tokens, and one window of {length} needs at least {length + 1}")
    pairs = np.lib.stride_tricks.sliding_window_view(ids, length + 1)
    rows = pairs[: len(ids) - length : stride]
    if not drop_last and (count(len(ids), length, stride) - 1) * stride + length + 1 < len(ids):
        rows = np.concatenate([rows, pairs[-1:]])
    return rows[:, :-1], rows[:, 1:]
