"""This module implements dropout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def off(rate: Any) -> bool:
    """Returns True if the dropout rate is a Python number equal to 0, so that dropout can be skipped.

    For a traced dropout rate, whose value is unknown, the result is False.
    """
    return isinstance(rate, int | float) and rate == 0


def dropout(x: jax.Array, rate: float | jax.Array, key: jax.Array | None) -> jax.Array:
    """Sets each element of x to zero with probability `rate`, and multiplies the other elements by 1 / (1 - rate).

    If `key` is None, `dropout` returns x unchanged.
    """
    if key is None or off(rate):
        return x
    # The division by 1 - rate is in float32, because bfloat16 would round 1 - rate.
    kept = (x.astype(jnp.float32) / (1 - rate)).astype(x.dtype)
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), kept, 0)
