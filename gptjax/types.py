"""The nouns that every part of the package shares. Nothing here imports jax."""

from __future__ import annotations

from typing import Any, NamedTuple

from gptjax.errors import UserError, complaints

__all__ = ["Batch", "Mean", "Metrics", "Params", "UserError", "complaints"]

Params = dict[str, Any]  # nested dict of arrays, paths such as "blocks/attn/q/kernel"
Metrics = dict[str, Any]  # name -> Mean or scalar


class Mean(NamedTuple):
    """A mean that has not been divided yet: add totals and weights first, divide once.

    Losses are kept this way so that accumulation, padding, packing and sharding agree exactly.
    """

    total: Any
    weight: Any

    def value(self) -> Any:
        return self.total / self.weight


class Batch(NamedTuple):
    """One batch of next-token prediction, a pytree; `None` leaves mean "not needed here".

    tokens       [B, T] int32    input ids
    targets      [B, T] int32    the token after each input
    weights      [B, T] float32  how much each target counts; None = every target counts 1
    segment_ids  [B, T] int32    which document a token belongs to; None = one document a row
    positions    [B, T] int32    position inside its document; None = 0..T-1
    """

    tokens: Any
    targets: Any
    weights: Any = None
    segment_ids: Any = None
    positions: Any = None
