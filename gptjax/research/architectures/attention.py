"""Attention with rotary positions: multi-head, grouped-query and multi-query are one function of n_kv_head.

    n_kv_head = n_head   multi-head      arXiv:1706.03762, 3.2.2
    between              grouped-query   arXiv:2305.13245: n_head / n_kv_head query heads read one key head
    n_kv_head = 1        multi-query     arXiv:1911.02150

The cache keeps 2 K H numbers a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.ops.attention import heads_attention
from gptjax.ops.linear import linear
from gptjax.ops.position import rope, rope_frequencies, rope_table
from gptjax.research.architectures.common import kernels, require
from gptjax.types import Params


@dataclass(frozen=True)
class Config:
    """Raises UserError where the heads do not divide d_model, or each other."""

    d_model: int
    n_head: int
    n_kv_head: int
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        D, N, K = self.d_model, self.n_head, self.n_kv_head
        require(
            (D % (2 * N) == 0, f"d_model ({D}) must be n_head ({N}) times an even number: rope turns pairs"),
            (N % K == 0, f"n_head ({N}) must be divisible by n_kv_head ({K})"),
        )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head


class Cache(NamedTuple):
    """k, v [B, K, S, H] float32, the first `length` (int32) of S slots filled."""

    k: jax.Array
    v: jax.Array
    length: jax.Array


def init(key: jax.Array, cfg: Config) -> Params:
    """q [D, N*H], k and v [D, K*H], o [N*H, D]."""
    D, wide, narrow = cfg.d_model, cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
    return kernels(key, {"q": (D, wide), "k": (D, narrow), "v": (D, narrow), "o": (wide, D)})


def apply(params: Params, x: jax.Array, cfg: Config) -> jax.Array:
    """x [B, T, D] -> [B, T, D], every place over itself and those before it."""
    return joined(params, heads_attention(*projected(params, x, cfg, 0)))


def init_cache(cfg: Config, batch: int, length: int) -> Cache:
    shape = (batch, cfg.n_kv_head, length, cfg.head_dim)
    return Cache(jnp.zeros(shape), jnp.zeros(shape), jnp.int32(0))


def extend(params: Params, x: jax.Array, cfg: Config, cache: Cache) -> tuple[jax.Array, Cache]:
    """The next T places; the caller keeps cache.length + T within the slots."""
    q, k, v = projected(params, x, cfg, cache.length)
    k, v = (
        jax.lax.dynamic_update_slice(old, new, (0, 0, cache.length, 0)) for old, new in ((cache.k, k), (cache.v, v))
    )
    y = heads_attention(q, k, v, offset=cache.length)
    return joined(params, y), Cache(k, v, cache.length + x.shape[1])


def projected(
    params: Params, x: jax.Array, cfg: Config, first: int | jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [B, T, N, H], k and v [B, K, T, H]; q and k turned by their positions, from `first` on."""
    B, T, _ = x.shape
    q, k, v = (linear(x, params[name]["kernel"]).reshape(B, T, -1, cfg.head_dim) for name in "qkv")
    table = rope_table(first + jnp.arange(T), rope_frequencies(cfg.head_dim, cfg.rope_base))
    return rope(q, table), rope(k, table).transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def joined(params: Params, y: jax.Array) -> jax.Array:
    """The heads' results [B, T, N, H], side by side, through o: [B, T, D]."""
    return linear(y.reshape(*y.shape[:2], -1), params["o"]["kernel"])
