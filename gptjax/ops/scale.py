"""Multiplication of activations by learned factors."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_vjp
def scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x [.., D] * factor in x's dtype, factor [] or [D] float32; the factor's gradient is accumulated in float32.

    That gradient is a sum over all tokens. A bfloat16 sum stops growing once it is 256 times its terms.
    """
    return x * factor.astype(x.dtype)


def _forward(x, factor):
    return scaled(x, factor), (x, factor)


def _backward(residual, g):
    x, factor = residual
    terms = g.astype(jnp.float32) * x.astype(jnp.float32)
    return g * factor.astype(g.dtype), terms.sum(tuple(range(x.ndim - factor.ndim))).astype(factor.dtype)


scaled.defvjp(_forward, _backward)
