"""Helpers shared by the architectures: initialisation and config validation."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gptjax.errors import UserError
from gptjax.types import Params


def kernels(key: jax.Array, shapes: Mapping[str, tuple[int, ...]]) -> Params:
    """Initialises float32 kernels [.., in, out] from N(0, 1 / in).

    Returns:
        A nested dict, in which the path of each kernel is "<name>/kernel", for each name in `shapes`.
    """
    return {
        name: {"kernel": jax.random.normal(jax.random.fold_in(key, i), shape) * shape[-2] ** -0.5}
        for i, (name, shape) in enumerate(shapes.items())
    }


def norm_scale(size: int) -> Params:
    return {"scale": jnp.ones(size)}


def require(*conditions: tuple[bool, str]) -> None:
    """Checks that all conditions hold, each of which is given as a pair (condition, error message).

    Raises:
        UserError: a condition is false; the error lists the messages of all conditions that are false.
    """
    if problems := [text for holds, text in conditions if not holds]:
        raise UserError.all(problems)
