"""This module defines the activation functions of the feed-forward layer."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

_C = math.sqrt(2 / math.pi)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Computes the tanh approximation of GELU, x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), as in GPT-2.

    Source: arXiv:1606.08415, section 2.

    `gelu` computes the equivalent formula x * sigmoid(2z), where z is the argument of tanh, so that one exponential
    gives both the value and the derivative. The derivative of GELU is saved for the backward pass instead of x, so that
    the backward pass recomputes nothing.
    """
    return _gelu(x)[0]


def _gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    h = x.astype(jnp.float32)
    square = h * h
    gate = jax.nn.sigmoid(2 * _C * h * (1 + 0.044715 * square))
    slope = gate + h * gate * (1 - gate) * (2 * _C) * (1 + 3 * 0.044715 * square)
    return (h * gate).astype(x.dtype), slope.astype(x.dtype)


gelu.defvjp(_gelu, lambda slope, g: (g * slope,))


def relu_squared(x: jax.Array) -> jax.Array:
    """Computes the squared ReLU, max(x, 0)^2, of Primer (arXiv:2109.08668)."""
    return jnp.square(jax.nn.relu(x))
