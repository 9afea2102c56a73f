"""Sliding-window attention: each token attends to the last `window` tokens, including itself.

The KV cache of a sliding-window layer has window - 1 slots. After L sliding-window layers, the receptive field of a
token is L (window - 1) + 1 tokens, as described in arXiv:2004.05150, section 3.1.

With a window of 3, the tokens 0 to 4 attend to the following tokens:

    0: 0    1: 0 1    2: 0 1 2    3: 1 2 3    4: 2 3 4
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gptjax.ops.attention import heads_attention
from gptjax.research.architectures import attention
from gptjax.research.architectures.attention import Cache
from gptjax.research.architectures.common import require
from gptjax.types import Params


@dataclass(frozen=True)
class Config(attention.Config):
    """Sizes of the sliding-window attention layer: the attributes of `attention.Config`, and the window in tokens."""

    window: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        require((self.window >= 1, f"window ({self.window}) must be at least 1: a token attends to itself"))


init = attention.init


def apply(params: Params, x: jax.Array, cfg: Config) -> jax.Array:
    """Applies causal sliding-window attention to x [B, T, D], and returns the outputs [B, T, D]."""
    y = heads_attention(*attention.project_qkv(params, x, cfg, 0), window=cfg.window)
    return attention.project_output(params, y)


def init_cache(cfg: Config, batch: int, length: int = 0) -> Cache:
    """Returns an empty KV cache with window - 1 slots; the argument `length` is ignored."""
    return attention.init_cache(cfg, batch, cfg.window - 1)


def extend(params: Params, x: jax.Array, cfg: Config, cache: Cache) -> tuple[jax.Array, Cache]:
    """Applies sliding-window attention to the next T tokens x [B, T, D], and updates the KV cache.

    The KV cache holds the keys and values of the last window - 1 tokens in order, left-aligned; older tokens are
    dropped. The attribute `length` of the KV cache counts all tokens read so far, including tokens whose keys and
    values have been dropped.
    """
    T, n_slots = x.shape[1], cfg.window - 1
    filled = jnp.minimum(cache.length, n_slots)
    q, *new = attention.project_qkv(params, x, cfg, cache.length)
    k, v = (
        jax.lax.dynamic_update_slice(jnp.pad(old, ((0, 0), (0, 0), (0, T), (0, 0))), added, (0, 0, filled, 0))
        for old, added in zip((cache.k, cache.v), new, strict=True)
    )
    y = heads_attention(q, k, v, offset=filled, window=cfg.window)
    n_dropped = jnp.maximum(filled + T - n_slots, 0)
    k, v = (jax.lax.dynamic_slice_in_dim(a, n_dropped, n_slots, axis=2) for a in (k, v))
    return attention.project_output(params, y), Cache(k, v, cache.length + T)
