"""This module controls the precision of float32 matrix products, whose operands GPUs and TPUs round by default:

                       GPU (Ampere and later)           TPU                        CPU
    default            TF32: 10 bits of mantissa        bfloat16: 7 bits           float32: 23 bits
    high               TF32                             three bfloat16 passes      float32
    highest            float32                          six bfloat16 passes        float32

Functions such as `forward` set the precision with the context manager `jax.default_matmul_precision`. The precision
applies to the matrix products that are traced inside the context manager, and to the matrix products that autodiff
derives from these matrix products. JAX may trace the backward function of a `jax.custom_vjp` after the program has left
the context manager `jax.default_matmul_precision`. The class `custom_vjp` in this module restores the matmul precision
for the backward function.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

from gptjax.config import ModelConfig


def default_precision() -> str | None:
    """Returns the current value of `jax.default_matmul_precision`.

    The type checker does not find the option `jax.config.jax_default_matmul_precision`, because jax defines the option
    on import.
    """
    return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]


@contextmanager
def matmul_precision(cfg: ModelConfig) -> Iterator[None]:
    """Context manager that sets the precision of matrix products to `cfg.precision`, unless `cfg.precision` is
    "default".

    For models with dtype=bfloat16, `matmul_precision` has no effect: every device multiplies bfloat16 operands exactly
    and accumulates in float32, so that a higher precision would cost time without changing the result.
    """
    if cfg.precision == "default" or cfg.dtype != "float32":
        yield
    else:
        with jax.default_matmul_precision(cfg.precision):
            yield


def with_matmul_precision(fn: Callable) -> Callable:
    """Decorator that runs `fn` inside `matmul_precision(cfg)`, where `cfg` is the argument named `cfg` of `fn`."""
    signature = inspect.signature(fn)

    @functools.wraps(fn)
    def inside(*args: Any, **options: Any) -> Any:
        with matmul_precision(signature.bind(*args, **options).arguments["cfg"]):
            return fn(*args, **options)

    return inside


def exact(fn: Callable) -> Callable:
    """Decorator that computes the matrix products in `fn` in full float32 precision on every device.

    The decorator `exact` is for functions whose results are stored as weights, such as a function that merges an
    adapter.
    """

    @functools.wraps(fn)
    def inside(*args: Any, **options: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return fn(*args, **options)

    return inside


def splash_keeps_it() -> bool:
    """Returns True if the current matmul precision is the default precision, which splash attention requires.

    At precisions other than the default, Mosaic cannot compile splash attention for bfloat16 arrays. For float32
    arrays, the backward pass of splash attention would ignore the matmul precision.
    """
    return default_precision() in (None, "default")


class custom_vjp:
    """A variant of `jax.custom_vjp` that traces the forward and backward functions at the matmul precision of the call.

    `jax.custom_vjp` traces the forward and backward functions only when JAX differentiates, which may happen after the
    program has left the context manager that sets the matmul precision.
    """

    def __init__(self, fn: Callable, nondiff_argnums: tuple[int, ...] = ()):
        functools.update_wrapper(self, fn)
        self._fn = jax.custom_vjp(_at_precision(fn), nondiff_argnums=(0, *(i + 1 for i in nondiff_argnums)))

    def defvjp(self, forward: Callable, backward: Callable) -> None:
        self._fn.defvjp(_at_precision(forward), _at_precision(backward))

    def __call__(self, *args: Any) -> Any:
        return self._fn(default_precision(), *args)


def _at_precision(fn: Callable) -> Callable:
    def with_precision(precision: str | None, *args: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return fn(*args)

    signature = inspect.signature(fn)
    first = inspect.Parameter("precision", inspect.Parameter.POSITIONAL_ONLY)
    with_precision.__name__ = fn.__name__
    with_precision.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])  # type: ignore[attr-defined]
    return with_precision
