"""Dropout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def off(number: Any) -> bool:
    """Whether a setting is 0, and what it is for left out. One that is traced has no value yet: it counts as on."""
    return isinstance(number, int | float) and number == 0


def dropout(x: jax.Array, rate: float | jax.Array, key: jax.Array | None) -> jax.Array:
    """Each number is zeroed with probability `rate`, the rest grow by 1 / (1 - rate); no key, no change."""
    if key is None or off(rate):
        return x
    kept = (x.astype(jnp.float32) / (1 - rate)).astype(x.dtype)  # 1 - rate is not rounded to bfloat16
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), kept, 0)
