"""This module defines `LoraWeight` and `MissWeight`, the parameter leaves that hold an adapted weight and its
adapter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gptjax.ops.dropout import dropout
from gptjax.ops.linear import dense, factors, matmul, matmul_transposed, take
from gptjax.ops.scale import scaled


@struct.dataclass
class LoraWeight:
    """Represents the weight w + scale * a @ b without materialising the sum of the two matrices.

    With DoRA, the columns of the adapted weight are rescaled to the norms in the magnitude vector `m`.

    Attributes:
        w: frozen weight [.., in, out] of any type that `ops.linear` supports, quantised or not.
        a: first low-rank factor [.., in, R] float32; with one adapter per row of the batch, [.., B, in, R].
        b: second low-rank factor [.., R, out] float32; with one adapter per row of the batch, [.., B, R, out].
        scale: factor of a @ b, [..] float32; with one adapter per row of the batch, [.., B].
        m: magnitude vector of DoRA, [.., 1, out], or None.
        key: PRNG keys of the dropout, [..], or None for no dropout.
        rate: dropout rate on the input of `a`, [..], or None for no dropout.

    In the shapes of the attributes, R is the rank of the adapter, B is the number of rows of the batch, and .. is the
    layer axis of a stacked weight, or nothing.

    Only a, b and m receive gradients. Sources of the formulas: LoRA, arXiv:2106.09685, eq. 3; DoRA, arXiv:2402.09353,
    eq. 5 and 11.
    """

    w: Any
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    m: jax.Array | None = None
    key: jax.Array | None = None
    rate: jax.Array | None = None


@matmul.register
def _(leaf: LoraWeight, x: jax.Array, dtype: str = "float32") -> jax.Array:
    y = matmul(leaf.w, x, dtype)
    low = x if leaf.rate is None else dropout(x, leaf.rate, leaf.key)
    # With one adapter per row of the batch, the matrix products with the LoRA factors a and b accumulate in float32.
    if leaf.a.ndim == 3:
        B = leaf.a.shape[0]
        low = _batched(low.reshape(B, -1, low.shape[-1]), leaf.a)
        add = _batched(low, leaf.b) * leaf.scale[:, None, None].astype(x.dtype)
        return y + add.reshape(*x.shape[:-1], add.shape[-1])
    add = leaf.scale.astype(y.dtype) * matmul(leaf.b, matmul(leaf.a, low, dtype), dtype)
    if leaf.m is None:
        return y + add
    return scaled(y + add, (leaf.m / column_norms(leaf))[0])


@matmul_transposed.register
def _(leaf: LoraWeight, x: jax.Array, dtype: str = "float32") -> jax.Array:
    add = matmul_transposed(leaf.a, matmul_transposed(leaf.b, x, dtype), dtype)
    return matmul_transposed(leaf.w, x, dtype) + leaf.scale.astype(x.dtype) * add


@take.register
def _(leaf: LoraWeight, ids: jax.Array) -> jax.Array:
    return take(leaf.w, ids) + leaf.scale * matmul(leaf.b, take(leaf.a, ids))


@dense.register
def _(leaf: LoraWeight) -> jax.Array:
    """Returns the materialised adapted weight, float32 [.., in, out]."""
    w = dense(leaf.w).astype(jnp.float32) + leaf.scale[..., None, None] * (leaf.a @ leaf.b)
    return w if leaf.m is None else w * (leaf.m / column_norms(leaf))


@factors.register
def _(leaf: LoraWeight, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns two plain arrays whose product is the output of the adapted weight for the input x.

    Without dropout, the two returned arrays are the input x and the materialised adapted weight. Dropout is applied to
    the input of the LoRA factor `a` but not to the input of the frozen weight `w`. With dropout, the first returned
    array is the concatenation of x and dropout(x) @ a along the last axis, and the second returned array is the
    concatenation of w and scale * b along the first axis. For DoRA, the columns of the second returned array are
    rescaled to the norms in the magnitude vector.
    """
    if leaf.rate is None or leaf.key is None:
        return x, dense(leaf)
    low = matmul(leaf.a, dropout(x, leaf.rate, leaf.key), str(x.dtype))
    kernel = jnp.concatenate([dense(leaf.w).astype(jnp.float32), leaf.scale * leaf.b])
    kernel = kernel if leaf.m is None else kernel * (leaf.m / column_norms(leaf))
    return jnp.concatenate([x, low], -1), kernel


@struct.dataclass
class MissWeight:
    """Represents a weight with a MiSS adapter, whose row i is w[i] + scale * d[i mod R], without materialising the sum.

    The product of the input x and the adapted weight is x @ w + scale * s @ d, where s [.., R] is the sum over the
    consecutive blocks of R channels of x. For example, s = [x0 + x2 + x4 + .., x1 + x3 + x5 + ..] for R = 2. The last
    block of channels of x is padded with zeros to R channels, where R is the rank of the MiSS adapter.

    Attributes:
        w: frozen weight [.., in, out] of any type that `ops.linear` supports, quantised or not.
        d: matrix of MiSS, [.., R, out] float32.
        scale: factor of d, [..] float32: 1, or 0 in layers without an adapter.
        key: PRNG keys of the dropout, [..], or None for no dropout.
        rate: dropout rate on the input of the block sum, [..], or None for no dropout.

    In the shapes of the attributes, R is the rank of the adapter, and .. is the layer axis of a stacked weight, or
    nothing. Only d receives gradients.

    Source: MiSS, arXiv:2409.15371, with the initialisation of PEFT's MissConfig(init_weights=True).
    """

    w: Any
    d: jax.Array
    scale: jax.Array
    key: jax.Array | None = None
    rate: jax.Array | None = None


@matmul.register
def _(leaf: MissWeight, x: jax.Array, dtype: str = "float32") -> jax.Array:
    add = matmul(leaf.d, _block_sum(leaf, x), dtype)
    return matmul(leaf.w, x, dtype) + leaf.scale.astype(add.dtype) * add


@dense.register
def _(leaf: MissWeight) -> jax.Array:
    """Returns the materialised adapted weight, float32 [.., in, out]."""
    w = dense(leaf.w).astype(jnp.float32)
    rows = jnp.arange(w.shape[-2]) % leaf.d.shape[-2]
    return w + leaf.scale[..., None, None] * leaf.d.take(rows, -2)


@factors.register
def _(leaf: MissWeight, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns two plain arrays whose product is the output of the adapted weight for the input x.

    The first returned array is the input x with the block sums of x appended as further columns. The second returned
    array is the frozen weight w with scale * d appended as further rows, where d is the MiSS matrix.
    """
    kernel = jnp.concatenate([dense(leaf.w).astype(jnp.float32), leaf.scale * leaf.d])
    return jnp.concatenate([x, _block_sum(leaf, x)], -1), kernel


def _block_sum(leaf: MissWeight, x: jax.Array) -> jax.Array:
    """Returns the sum [.., R] over the consecutive blocks of R channels of x [.., in], after dropout on x."""
    low, R = x if leaf.rate is None else dropout(x, leaf.rate, leaf.key), leaf.d.shape[-2]
    low = jnp.pad(low, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % R)])
    return low.reshape(*x.shape[:-1], -1, R).sum(-2)


def column_norms(leaf: LoraWeight) -> jax.Array:
    """Returns the column norms [.., 1, out] of w + scale * a @ b without materialising the sum of the two matrices.

    With s = scale, the squared norm of each column is |w + s a b|^2 = |w|^2 + 2 s sum_r b * (a^T w) + s^2 sum_r b *
    ((a^T a) b). No gradient flows through the column norms, as in DoRA (arXiv:2402.09353, 4.3).
    """
    w, a, b, s = jax.lax.stop_gradient((dense(leaf.w), leaf.a, leaf.b, leaf.scale[..., None, None]))
    a_t = jnp.swapaxes(a, -1, -2)
    base = jnp.square(w.astype(jnp.float32)).sum(-2, keepdims=True)
    cross = (b * (a_t @ w.astype(b.dtype))).sum(-2, keepdims=True)
    low_rank = (b * ((a_t @ a) @ b)).sum(-2, keepdims=True)
    return jnp.sqrt(base + 2 * s * cross + s * s * low_rank)


def _batched(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)
