"""This module defines the KV cache, which holds the attention keys and values of all tokens processed so far."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from gptjax.config import ModelConfig
from gptjax.ops.device import activation_dtype

_ROWS = 16  # Up to _ROWS rows are written to the cache row by row in place, more rows by one scatter.


class Cache(struct.PyTreeNode):
    """Holds the keys and values of all layers for decoding.

    In each row, slot p of the cache holds the keys and values of the token at position p. In each row of the cache, the
    slots from index `length` on are empty.

    Attributes:
        k, v: keys and values, [L, B, K, S, H] in float32, bfloat16 or int8, for K key heads, S slots and H channels per
            head.
        scales: quantisation scales of int8 keys and values, [L, B, K, S, 1] float32 each, or None for other dtypes.
        length: number of tokens in each row, [B] int32. Reducing `length` drops the last tokens of a row.
        x: token embeddings, [B, S, D] in the dtype of activations, or None without cfg.smear, which adds to each token
            embedding a weighted copy of the previous token's embedding.
        empty: static bool that is True before the first `write`. If `empty` is True, prefill attends to the keys of
            the new tokens without reading the cache.
    """

    k: jax.Array
    v: jax.Array
    scales: tuple[jax.Array, jax.Array] | None
    length: jax.Array
    x: jax.Array | None
    empty: bool = struct.field(pytree_node=False, default=False)

    def write(self, layer: int | jax.Array, k: jax.Array, v: jax.Array) -> Cache:
        """Returns the cache with the keys k and values v [B, K, T, H] of one layer written into the slots from `length`
        on."""
        if self.scales is None:
            return self.replace(k=self._put(self.k, layer, k), v=self._put(self.v, layer, v))
        (k, k_scale), (v, v_scale) = (_to_int8(a) for a in (k, v))
        k_scales, v_scales = self.scales
        scales = self._put(k_scales, layer, k_scale), self._put(v_scales, layer, v_scale)
        return self.replace(k=self._put(self.k, layer, k), v=self._put(self.v, layer, v), scales=scales)

    def read(self, layer: int | jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        """Returns the keys and the values of one layer, [B, K, S, H] each, cast to `dtype`."""
        k, v = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False).astype(dtype) for a in (self.k, self.v))
        if self.scales is None:
            return k, v
        k_scale, v_scale = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in self.scales)
        k, v = k.astype(jnp.float32) * k_scale, v.astype(jnp.float32) * v_scale
        return k.astype(dtype), v.astype(dtype)

    def remember(self, x: jax.Array) -> Cache:
        """Returns the cache with the token embeddings x [B, T, D] written into the slots from `length` on of the field
        `x`."""
        assert self.x is not None  # cfg.smear
        return self.replace(x=self._put(self.x[None, :, None], 0, x[:, None])[0, :, 0])

    def before(self) -> jax.Array:
        """Returns the token embedding of the last token of each row, [B, D], or zeros for an empty row."""
        assert self.x is not None  # cfg.smear
        last = jnp.take_along_axis(self.x, jnp.maximum(self.length - 1, 0)[:, None, None], 1)[:, 0]
        return jnp.where(self.length[:, None] > 0, last, 0)

    def _put(self, old: jax.Array, layer: int | jax.Array, new: jax.Array) -> jax.Array:
        """Returns the array `old` with `new` [B, K, T, *] written at [layer, row, :, length[row]:, :] for each row."""
        new = new.astype(old.dtype)[None]
        if self.empty:
            return jax.lax.dynamic_update_slice(old, new, (layer, 0, 0, 0, 0))
        if new.shape[1] > _ROWS:

            def one_row(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_slice(old, new, (layer, 0, start, 0))

            return jax.vmap(one_row, in_axes=(1, 1, 0), out_axes=1)(old, new, self.length)
        for row in range(new.shape[1]):
            old = jax.lax.dynamic_update_slice(old, new[:, row : row + 1], (layer, row, 0, self.length[row], 0))
        return old


def _to_int8(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantises `a` [.., H] symmetrically to int8 with one float32 scale [.., 1] per head and token."""
    a = a.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(a).max(-1, keepdims=True), 1e-30) / 127
    return jnp.round(a / scale).astype(jnp.int8), scale


def init_cache(cfg: ModelConfig, batch: int, length: int | None = None, dtype: DTypeLike | None = None) -> Cache:
    """Returns an empty KV cache for `batch` rows with `length` slots each (default: the context length).

    Args:
        dtype: dtype of keys and values: float32, bfloat16, int8, or None for the dtype of activations, which is
            `cfg.dtype` (float32 on a CPU). An int8 cache takes a quarter of the memory of a float32 cache, and rounds
            the key and value vectors of each head to multiples of 1/127 of the vector's largest magnitude.
    """
    slots, dtype = length or cfg.context_length, activation_dtype(cfg.dtype) if dtype is None else dtype
    shape = (cfg.n_layer, batch, cfg.n_kv_head, slots, cfg.head_dim)
    scale = (*shape[:-1], 1)
    return Cache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        scales=(jnp.zeros(scale), jnp.zeros(scale)) if jnp.dtype(dtype) == jnp.int8 else None,
        length=jnp.zeros(batch, jnp.int32),
        x=jnp.zeros((batch, slots, cfg.d_model), activation_dtype(cfg.dtype)) if cfg.smear else None,
        empty=True,
    )
