"""The building blocks of a transformer as plain functions of arrays, which the notebooks use.

Unlike the functions in `from_scratch`, the model in `gptjax.model` has biases, query and key norms, RoPE and the KV
cache. The tests compare the results of the model in `gptjax.model` with the results of the functions in `from_scratch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.ops.activation import gelu
from gptjax.ops.attention import attention
from gptjax.ops.linear import linear


def simple_attention(x: jax.Array) -> jax.Array:
    """Computes self-attention without trainable weights, x [T, D] -> [T, D]: softmax(x x^T) x.

    Every output row is a weighted mean of all rows of x.
    """
    return jax.nn.softmax(x @ x.T, axis=-1) @ x


def causal_mask(n_query: int, n_key: int, offset: int | jax.Array = 0) -> jax.Array:
    """Returns the mask of causal attention, [T, S] bool; the element [t, s] is True if query t may attend to key s.

    Query t is at position t + offset, so query t may attend to the keys s <= t + offset.

    causal_mask(3, 3)   1 0 0
                        1 1 0
                        1 1 1
    """
    return jnp.arange(n_key)[None, :] <= jnp.arange(n_query)[:, None] + offset


def multi_head_attention(
    x: jax.Array, w_q: Any, w_k: Any, w_v: Any, w_o: Any, n_head: int, **options: Any
) -> jax.Array:
    """Computes causal multi-head self-attention, x [B, T, D] -> [B, T, D].

    The weights are w_q [D, N*H]; w_k, w_v [D, K*H]; w_o [N*H, D], with N = n_head query heads and K key and value
    heads, all of dimension H. `options` are keyword arguments of `gptjax.ops.attention.heads_attention`, such as
    `window` or `alibi`. Source: arXiv:1706.03762, 3.2.2.
    """
    B, T, _ = x.shape
    H = w_q.shape[-1] // n_head
    q, k, v = (linear(x, w).reshape(B, T, -1, H) for w in (w_q, w_k, w_v))
    return linear(attention(q, k, v, **options).reshape(B, T, -1), w_o)


def feed_forward(
    x: jax.Array, w_up: Any, w_down: Any, w_gate: Any = None, *, activation: Callable[[jax.Array], jax.Array] = gelu
) -> jax.Array:
    """Computes a feed-forward layer (MLP): activation(x w_up) w_down, x [.., D] -> [.., D], with w_up, w_gate [D, F]
    and w_down [F, D].

    If w_gate is given, the feed-forward layer is SwiGLU: (silu(x w_gate) * x w_up) w_down (arXiv:2002.05202, eq. 6).
    """
    up = linear(x, w_up)
    hidden = activation(up) if w_gate is None else jax.nn.silu(linear(x, w_gate)) * up
    return linear(hidden, w_down)
