"""Dropout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def off(rate: Any) -> bool:
    """Returns True if a dropout rate is a Python number equal to 0, so that dropout can be skipped.

    For a traced rate, which may or may not be 0, the result is False.
    """
    return isinstance(rate, int | float) and rate == 0


def dropout(x: jax.Array, rate: float | jax.Array, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate); without a key, returns x."""
    if key is None or off(rate):
        return x
    kept = (x.astype(jnp.float32) / (1 - rate)).astype(x.dtype)  # in float32, because bfloat16 would round 1 - rate
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), kept, 0)
