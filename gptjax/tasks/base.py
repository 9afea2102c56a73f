"""The shape of a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Task(NamedTuple):
    """Three pure functions, as optax has two.

    prepare(example) -> example   what the loss reads, from what the data holds
    init(key) -> params           the tree the loss reads
    loss(params, batch, key) -> (Mean(total, weight), metrics)
    """

    prepare: Callable[[Any], Any]
    init: Callable[[Any], Any]
    loss: Callable[[Any, Any, Any], Any]
