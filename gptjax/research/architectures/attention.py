"""Attention with rotary position embeddings (RoPE).

The number of key/value heads, n_kv_head, selects multi-head, grouped-query or multi-query attention:

    n_kv_head = n_head   multi-head      arXiv:1706.03762, 3.2.2
    values in between    grouped-query   arXiv:2305.13245: n_head / n_kv_head query heads share one key head
    n_kv_head = 1        multi-query     arXiv:1911.02150

The KV cache holds 2 * n_kv_head * head_dim elements per token. In shapes, B is the number of rows, T is the number of
tokens per row, D = d_model, N = n_head, K = n_kv_head and H = head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax._moved import moved_name
from gptjax.ops.attention import heads_attention
from gptjax.ops.linear import linear
from gptjax.ops.position import rope, rope_frequencies, rope_table
from gptjax.research.architectures.common import kernels, require
from gptjax.types import Params


@dataclass(frozen=True)
class Config:
    """Sizes of the attention layer.

    Raises:
        UserError: the head size d_model / n_head is not an even integer, or n_kv_head does not divide n_head.
    """

    d_model: int
    n_head: int
    n_kv_head: int
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        D, N, K = self.d_model, self.n_head, self.n_kv_head
        require(
            (D % (2 * N) == 0, f"d_model ({D}) must be n_head ({N}) times an even number: RoPE rotates pairs"),
            (N % K == 0, f"n_head ({N}) must be divisible by n_kv_head ({K})"),
        )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head


class Cache(NamedTuple):
    """KV cache with S slots per row: keys and values [B, K, S, H] float32.

    The attribute `length` (int32) of a KV cache is the number of filled slots; the filled slots precede the empty
    slots.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array


def init(key: jax.Array, cfg: Config) -> Params:
    """Initialises the kernels of the attention projections: q [D, N*H], k and v [D, K*H], and output o [N*H, D]."""
    D, wide, narrow = cfg.d_model, cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
    return kernels(key, {"q": (D, wide), "k": (D, narrow), "v": (D, narrow), "o": (wide, D)})


def apply(params: Params, x: jax.Array, cfg: Config) -> jax.Array:
    """Applies causal self-attention to x [B, T, D], and returns the outputs [B, T, D]."""
    return project_output(params, heads_attention(*project_qkv(params, x, cfg, 0)))


def init_cache(cfg: Config, batch: int, length: int) -> Cache:
    shape = (batch, cfg.n_kv_head, length, cfg.head_dim)
    return Cache(jnp.zeros(shape), jnp.zeros(shape), jnp.int32(0))


def extend(params: Params, x: jax.Array, cfg: Config, cache: Cache) -> tuple[jax.Array, Cache]:
    """Applies causal attention to the next T tokens x [B, T, D], and writes the tokens' keys and values to the cache.

    The caller must ensure that cache.length + T does not exceed the number of slots in the cache.
    """
    q, k, v = project_qkv(params, x, cfg, cache.length)
    k, v = (
        jax.lax.dynamic_update_slice(old, new, (0, 0, cache.length, 0)) for old, new in ((cache.k, k), (cache.v, v))
    )
    y = heads_attention(q, k, v, offset=cache.length)
    return project_output(params, y), Cache(k, v, cache.length + x.shape[1])


def project_qkv(
    params: Params, x: jax.Array, cfg: Config, first: int | jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Projects x [B, T, D] to queries [B, T, N, H], and to keys and values [B, K, T, H].

    RoPE rotates the queries and keys; the first token has the position `first`.
    """
    B, T, _ = x.shape
    q, k, v = (linear(x, params[name]["kernel"]).reshape(B, T, -1, cfg.head_dim) for name in "qkv")
    table = rope_table(first + jnp.arange(T), rope_frequencies(cfg.head_dim, cfg.rope_base))
    return rope(q, table), rope(k, table).transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def project_output(params: Params, y: jax.Array) -> jax.Array:
    """Concatenates the outputs of the attention heads, [B, T, N, H], and applies the output projection to [B, T, D]."""
    return linear(y.reshape(*y.shape[:2], -1), params["o"]["kernel"])


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
