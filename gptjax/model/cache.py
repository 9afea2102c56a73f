"""The key-value cache: what decoding remembers of the tokens it has read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gptjax.config import ModelConfig


@struct.dataclass
class Cache:
    """Keys and values of all layers, in slots in order of time.

    k, v    [L, B, S, K, H]
    valid   [B, S] bool, False for slots that hold padding or nothing
    length  int32, how many slots have been written, the same for every row: short prompts are padded on the left
    last    [B, D] the embedding of the last token, zero where there is none; None without cfg.smear
    """

    k: jax.Array
    v: jax.Array
    valid: jax.Array
    length: jax.Array
    last: jax.Array | None = None

    def write(self, layer: jax.Array, k: jax.Array, v: jax.Array) -> Cache:
        """k, v [B, T, K, H] of `layer` into the slots from `length` on."""
        start = (layer, 0, self.length, 0, 0)
        return self.replace(
            k=jax.lax.dynamic_update_slice(self.k, k[None].astype(self.k.dtype), start),
            v=jax.lax.dynamic_update_slice(self.v, v[None].astype(self.v.dtype), start),
        )

    def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of `layer`, [B, S, K, H] each."""
        return tuple(jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (self.k, self.v))


def init_cache(cfg: ModelConfig, batch: int, length: int | None = None, dtype: Any = jnp.float32) -> Cache:
    """An empty cache of `length` slots (the context length if not given) for `batch` rows."""
    slots = length or cfg.context_length
    shape = (cfg.n_layer, batch, slots, cfg.n_kv_head, cfg.head_dim)
    return Cache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        valid=jnp.zeros((batch, slots), bool),
        length=jnp.int32(0),
        last=jnp.zeros((batch, cfg.d_model), dtype) if cfg.smear else None,
    )
