"""What these architectures share: fresh matrices, and one way to say that sizes do not fit."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gptjax.errors import UserError
from gptjax.types import Params


def kernels(key: jax.Array, shapes: Mapping[str, tuple[int, ...]]) -> Params:
    """{name: {"kernel": [.., in, out] float32}}, N(0, 1 / in) each."""
    return {
        name: {"kernel": jax.random.normal(jax.random.fold_in(key, i), shape) * shape[-2] ** -0.5}
        for i, (name, shape) in enumerate(shapes.items())
    }


def norm_scale(size: int) -> Params:
    return {"scale": jnp.ones(size)}


def require(*conditions: tuple[bool, str]) -> None:
    """(what must hold, what to say where it does not), ..

    Raises:
        UserError: one line for each that does not hold.
    """
    if wrong := [text for holds, text in conditions if not holds]:
        raise UserError.all(wrong)
