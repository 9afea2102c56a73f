"""This module checks the range of token ids outside `jit`, where the values of the ids are known."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from gptjax.errors import UserError


def is_local(array: Any) -> bool:
    """Returns True if this process can read all values of the array."""
    return getattr(array, "is_fully_addressable", True)


def check_ids(name: str, ids: Any, vocab_size: int, weights: Any = None) -> None:
    """Checks that the token ids [..] are within 0 to vocab_size - 1, and ignores ids with weight 0.

    Under `jit`, `check_ids` checks nothing, because the values of the ids are unknown; embedding lookups clip ids that
    are out of range.

    Raises:
        UserError: an id is out of range.
    """
    if any(isinstance(a, jax.core.Tracer) or not is_local(a) for a in (ids, weights)) or not vocab_size:
        return
    ids = np.asarray(ids)
    ids = ids if weights is None else ids[np.asarray(weights) != 0]
    if not ids.size:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"{name}: the ids range from {low} to {high}, but the vocabulary size is {vocab_size}: "
            f"expected 0 to {vocab_size - 1}"
        )
