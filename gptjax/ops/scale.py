"""This module multiplies activations by learned factors."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_vjp
def scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns x [.., D] times a learned factor, which is a float32 scalar or vector [D] and is first cast to the dtype
    of x.

    The gradient of the factor is a sum over all tokens. The gradient of the factor is accumulated in float32, because a
    bfloat16 sum stops growing once the sum is 256 times as large as its terms.
    """
    return x * factor.astype(x.dtype)


def _forward(x, factor):
    return scaled(x, factor), (x, factor)


def _backward(residual, g):
    x, factor = residual
    terms = g.astype(jnp.float32) * x.astype(jnp.float32)
    return g * factor.astype(g.dtype), terms.sum(tuple(range(x.ndim - factor.ndim))).astype(factor.dtype)


scaled.defvjp(_forward, _backward)
