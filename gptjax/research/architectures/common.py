"""Functions that the layers of `gptjax.research.architectures` share: initialisation and config validation."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gptjax.errors import UserError
from gptjax.types import Params


def kernels(key: jax.Array, shapes: Mapping[str, tuple[int, ...]]) -> Params:
    """Initialises float32 kernels of shape [.., in, out] from a normal distribution with mean 0 and variance 1 / in.

    Returns:
        A nested dict with one kernel per entry of `shapes`, at the path "<name>/kernel".
    """
    return {
        name: {"kernel": jax.random.normal(jax.random.fold_in(key, i), shape) * shape[-2] ** -0.5}
        for i, (name, shape) in enumerate(shapes.items())
    }


def norm_scale(size: int) -> Params:
    return {"scale": jnp.ones(size)}


def require(*conditions: tuple[bool, str]) -> None:
    """Raises an error if a condition is false. Each argument is a pair (condition, error message).

    Raises:
        UserError: at least one condition is false. The error lists the messages of all false conditions.
    """
    if problems := [text for holds, text in conditions if not holds]:
        raise UserError.all(problems)
