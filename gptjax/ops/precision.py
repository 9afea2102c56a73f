"""The precision of float32 products on devices that shorten their operands.

                       GPU (Ampere and later)           TPU                        CPU
    default            TF32: 10 bits of mantissa        bfloat16: 7 bits           float32: 23 bits
    high               TF32                             three bfloat16 passes      float32
    highest            float32                          six bfloat16 passes        float32

The setting is JAX's own, `jax.default_matmul_precision`, entered by the model's doors: a product takes it when it is
traced and its transpose keeps it. Only a backward function that is written out is traced later, after the door is
left: `custom_vjp` here carries the precision over to it.
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
    """JAX's setting where this is called."""
    return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]  # defined when jax is imported


@contextmanager
def matmul_precision(cfg: ModelConfig) -> Iterator[None]:
    """All products traced inside have `cfg.precision`, high or highest; default leaves them to JAX's own setting.

    Products with dtype=bfloat16 stay as they are: their operands have 7 bits of mantissa, which every device multiplies
    exactly and sums in float32. More passes would only cost time.
    """
    if cfg.precision == "default" or cfg.dtype != "float32":
        yield
    else:
        with jax.default_matmul_precision(cfg.precision):
            yield


def with_matmul_precision(fn: Callable) -> Callable:
    """`fn` inside `matmul_precision(cfg)` of its argument `cfg`."""
    signature = inspect.signature(fn)

    @functools.wraps(fn)
    def inside(*args: Any, **options: Any) -> Any:
        with matmul_precision(signature.bind(*args, **options).arguments["cfg"]):
            return fn(*args, **options)

    return inside


def exact(fn: Callable) -> Callable:
    """`fn` with float32 products on every device: for weights that are computed once and kept, and for sums that are
    written as products."""

    @functools.wraps(fn)
    def inside(*args: Any, **options: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return fn(*args, **options)

    return inside


def splash_keeps_it() -> bool:
    """Whether JAX's setting leaves the products of splash alone. Under a stated precision Mosaic does not compile it in
    bfloat16, and in float32 its backward functions do not know of the setting."""
    return default_precision() in (None, "default")


class custom_vjp:
    """`jax.custom_vjp` whose forward and backward functions are traced at the precision in force at the call.

    JAX traces both when it differentiates, which may be long after the context that set the precision was left.
    """

    def __init__(self, fn: Callable, nondiff_argnums: tuple[int, ...] = ()):
        functools.update_wrapper(self, fn)
        self._fn = jax.custom_vjp(_at_precision(fn), nondiff_argnums=(0, *(i + 1 for i in nondiff_argnums)))

    def defvjp(self, forward: Callable, backward: Callable) -> None:
        self._fn.defvjp(_at_precision(forward), _at_precision(backward))

    def __call__(self, *args: Any) -> Any:
        return self._fn(default_precision(), *args)


def _at_precision(fn: Callable) -> Callable:
    def at(precision: str | None, *args: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return fn(*args)

    own = inspect.signature(fn)
    first = inspect.Parameter("precision", inspect.Parameter.POSITIONAL_ONLY)
    at.__name__ = fn.__name__
    at.__signature__ = own.replace(parameters=[first, *own.parameters.values()])  # type: ignore[attr-defined]
    return at
