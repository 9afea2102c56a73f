"""The parts of a transformer as functions of plain arrays, one step at a time: what the notebooks build a model from.

The model itself (`gptjax.model`) wires the same products with biases, norms of queries and keys, RoPE and the KV cache;
the tests hold it against these functions.
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
    """Self-attention without weights, x [T, D] -> [T, D]: every row becomes a mean of all rows, weighted by
    softmax(x x^T). The first step towards the real one; nothing is learned."""
    return jax.nn.softmax(x @ x.T, axis=-1) @ x


def causal_mask(n_query: int, n_key: int, offset: int | jax.Array = 0) -> jax.Array:
    """[T, S] bool, True where query t, standing at t + offset, may see key s: s <= t + offset.

    causal_mask(3, 3)   1 0 0
                        1 1 0
                        1 1 1
    """
    return jnp.arange(n_key)[None, :] <= jnp.arange(n_query)[:, None] + offset


def multi_head_attention(
    x: jax.Array, w_q: Any, w_k: Any, w_v: Any, w_o: Any, n_head: int, **options: Any
) -> jax.Array:
    """Causal self-attention of n_head heads side by side, x [B, T, D] -> [B, T, D]; options as in `attention`.

    w_q [D, N*H]; w_k, w_v [D, K*H]; w_o [N*H, D]. Source: arXiv:1706.03762, 3.2.2.
    """
    B, T, _ = x.shape
    H = w_q.shape[-1] // n_head
    q, k, v = (linear(x, w).reshape(B, T, -1, H) for w in (w_q, w_k, w_v))
    return linear(attention(q, k, v, **options).reshape(B, T, -1), w_o)


def feed_forward(
    x: jax.Array, w_up: Any, w_down: Any, w_gate: Any = None, *, activation: Callable[[jax.Array], jax.Array] = gelu
) -> jax.Array:
    """activation(x w_up) w_down at every position by itself, x [.., D] -> [.., D]; w_up, w_gate [D, F], w_down [F, D].

    With a gate, (silu(x w_gate) * x w_up) w_down instead: SwiGLU, arXiv:2002.05202, eq. 6.
    """
    up = linear(x, w_up)
    hidden = activation(up) if w_gate is None else jax.nn.silu(linear(x, w_gate)) * up
    return linear(hidden, w_down)
