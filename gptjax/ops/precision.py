"""Precision of float32 matrix products, whose operands GPUs and TPUs round by default.

                       GPU (Ampere and later)           TPU                        CPU
    default            TF32: 10 bits of mantissa        bfloat16: 7 bits           float32: 23 bits
    high               TF32                             three bfloat16 passes      float32
    highest            float32                          six bfloat16 passes        float32

The setting is `jax.default_matmul_precision`, which functions such as `forward` enter. A product takes the precision
when it is traced, and so do its gradients under autodiff. The backward function of `jax.custom_vjp` is traced later,
outside that context: `custom_vjp` in this module restores the precision for it.
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
    """The value of `jax.default_matmul_precision` in the current context."""
    return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]  # defined when jax is imported


@contextmanager
def matmul_precision(cfg: ModelConfig) -> Iterator[None]:
    """Trace matrix products with `cfg.precision` "high" or "highest"; "default" keeps JAX's current setting.

    Does nothing for models with dtype=bfloat16: every device multiplies bfloat16 operands exactly and sums in float32,
    so more passes would only cost time.
    """
    if cfg.precision == "default" or cfg.dtype != "float32":
        yield
    else:
        with jax.default_matmul_precision(cfg.precision):
            yield


def with_matmul_precision(fn: Callable) -> Callable:
    """Decorator: run `fn` inside `matmul_precision(cfg)`, where `cfg` is its argument of that name."""
    signature = inspect.signature(fn)

    @functools.wraps(fn)
    def inside(*args: Any, **options: Any) -> Any:
        with matmul_precision(signature.bind(*args, **options).arguments["cfg"]):
            return fn(*args, **options)

    return inside


def exact(fn: Callable) -> Callable:
    """Decorator: compute the matrix products of `fn` in full float32 on every device.

    For weights that are computed once and kept, and for sums that are written as products.
    """

    @functools.wraps(fn)
    def inside(*args: Any, **options: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return fn(*args, **options)

    return inside


def splash_keeps_it() -> bool:
    """Whether the current precision allows the splash kernel: only the default does.

    With another one, Mosaic cannot compile splash in bfloat16, and in float32 its backward pass ignores the setting.
    """
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
    def with_precision(precision: str | None, *args: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return fn(*args)

    signature = inspect.signature(fn)
    first = inspect.Parameter("precision", inspect.Parameter.POSITIONAL_ONLY)
    with_precision.__name__ = fn.__name__
    with_precision.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])  # type: ignore[attr-defined]
    return with_precision
