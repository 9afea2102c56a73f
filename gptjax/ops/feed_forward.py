"""The feed-forward layer as one function; the model's module wires the same products with biases and dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from gptjax.ops.activation import gelu
from gptjax.ops.linear import linear


def feed_forward(
    x: jax.Array, w_up: Any, w_down: Any, w_gate: Any = None, *, activation: Callable[[jax.Array], jax.Array] = gelu
) -> jax.Array:
    """activation(x w_up) w_down at every place for itself, x [.., D] -> [.., D]; w_up, w_gate [D, F], w_down [F, D].

    With a gate, (silu(x w_gate) * x w_up) w_down instead: SwiGLU, arXiv:2002.05202, eq. 6.
    """
    up = linear(x, w_up)
    hidden = activation(up) if w_gate is None else jax.nn.silu(linear(x, w_gate)) * up
    return linear(hidden, w_down)
