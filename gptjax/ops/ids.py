"""Token ids that are out of range: noticed where their values are known."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from gptjax.errors import UserError


def is_local(array: Any) -> bool:
    """Whether this process can look at all values."""
    return getattr(array, "is_fully_addressable", True)


def check_ids(name: str, ids: Any, vocab_size: int, weights: Any = None) -> None:
    """Raises UserError for ids [..] outside 0 to vocab_size - 1, of those whose weight is not 0. Under `jit` their
    values are not known, and an id outside counts as the nearest one."""
    if any(isinstance(a, jax.core.Tracer) or not is_local(a) for a in (ids, weights)) or not vocab_size:
        return
    ids = np.asarray(ids)
    ids = ids if weights is None else ids[np.asarray(weights) != 0]
    if not ids.size:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"{name}: from {low} to {high}, and the model has {vocab_size} of them: expected 0 to {vocab_size - 1}"
        )
