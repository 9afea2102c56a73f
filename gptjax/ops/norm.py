"""This module implements LayerNorm and RMSNorm over the last axis."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gptjax.ops.device import platform


def layer_norm(
    x: jax.Array, scale: jax.Array | None = None, bias: jax.Array | None = None, eps: float = 1e-5
) -> jax.Array:
    """Returns the layer norm (x - mean) / sqrt(var + eps) * scale + bias over the last axis, in the dtype of x.

    The layer norm is computed in float32. The variance is the biased estimate (divided by D, not D - 1), as in GPT-2.
    Source: arXiv:1607.06450, eq. 3.
    """

    def norm(x, scale, bias):
        h = x.astype(jnp.float32)
        h = h - h.mean(-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + eps)
        return _affine(h, scale, bias).astype(x.dtype)

    return _rematerialized(norm)(x, scale, bias)


def rms_norm(x: jax.Array, scale: jax.Array | None = None, eps: float = 1e-5) -> jax.Array:
    """Returns the RMS norm x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32, in the dtype of
    x.

    Source: arXiv:1910.07467.
    """

    def norm(x, scale):
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + eps)
        return _affine(h, scale, None).astype(x.dtype)

    return _rematerialized(norm)(x, scale)


def _rematerialized(fn: Callable) -> Callable:
    """Returns `fn` with rematerialisation in the backward pass, or on a CPU `fn` unchanged.

    With rematerialisation, JAX saves the inputs of `fn` for the backward pass instead of float32 intermediates.
    """
    return fn if platform() == "cpu" else jax.checkpoint(fn, prevent_cse=False)


def _affine(h: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    h = h if scale is None else h * scale
    return h if bias is None else h + bias
