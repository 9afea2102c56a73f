"""This module implements linear layers and matrix products with any type of weight: array, adapter or quantised
matrix."""

from __future__ import annotations

from functools import partial, singledispatch
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gptjax.ops.device import TENSOR, ProductAxes, constrain, platform

_FEW_ROWS = 64  # For at most _FEW_ROWS rows of x, a CPU computes (w @ x.T).T faster than x @ w.T.
_COLUMNS = 128  # On a GPU, `aligned_columns` pads the number of columns of a matrix to a multiple of _COLUMNS.


@singledispatch
def matmul(w: Any, x: jax.Array, dtype: str = "float32") -> jax.Array:
    """Returns the matrix product x @ w [.., out] of x [.., in] and w [in, out], in the dtype of x.

    If `dtype` is "bfloat16", both operands are cast to bfloat16. If `dtype` is "float32", w is cast to the dtype of x.
    The matrix product is accumulated in float32. `matmul` dispatches on the type of `w`: every type of weight other
    than a plain array (an adapter, a quantised matrix) registers an implementation, so that layers need not know the
    type of weight.
    """
    rows = x.reshape(-1, x.shape[-1])  # The CPU backend of XLA multiplies matrices faster than [B, T, ..] arrays.
    y = rows @ w.astype(x.dtype) if dtype == "float32" else _low_product(rows, w).astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@singledispatch
def matmul_transposed(w: Any, x: jax.Array, dtype: str = "float32") -> jax.Array:
    """Returns the matrix product x @ w.T [.., out] of x [.., in] and the transpose of w [out, in].

    The dtypes of operands and result are the same as in `matmul`. The model computes logits with `matmul_transposed` if
    the head shares weights with the token embeddings.
    """
    rows = x.reshape(-1, x.shape[-1])
    if dtype == "float32":
        # For few rows of x, the CPU backend of XLA is twice as fast with the larger operand, w, on the left.
        few = isinstance(rows.shape[0], int) and rows.shape[0] <= _FEW_ROWS and platform() == "cpu"
        y = (w.astype(x.dtype) @ rows.T).T if few else rows @ w.astype(x.dtype).T
    else:
        y = _low_product(rows, w.T).astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@singledispatch
def take(w: Any, ids: jax.Array) -> jax.Array:
    """Returns the rows [.., D] of the embedding table w [V, D] at the ids [..], with out-of-range ids clipped."""
    # The columns of the embedding table w are not sharded, because with sharded columns XLA would all-gather and
    # reshard the embeddings.
    return jnp.take(constrain(w, TENSOR, None), ids, axis=0, mode="clip")


@singledispatch
def dense(w: Any) -> jax.Array:
    """Returns the weight `w` as a plain array."""
    return w


@singledispatch
def factors(w: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns two plain arrays, x' [.., in'] and w' [in', out], whose product x' @ w' equals matmul(w, x).

    `gpt.head_factors` calls `factors`, so that the losses can compute the product of the hidden states and the LM head
    in chunks.
    """
    return x, dense(w)


@singledispatch
def transposed(w: Any) -> Any:
    """Returns the weight w [in, out] stored as [out, in], so that each column of w is contiguous in memory.

    If the type of the weight does not support the transposed layout, the weight is returned unchanged.
    """
    return Transposed(w.T) if isinstance(w, jax.Array) and jnp.issubdtype(w.dtype, jnp.floating) else w


@singledispatch
def side_by_side(w: Any, *others: Any) -> Any:
    """Returns matrices [.., in, out] with equal `in` concatenated along the axis `out`, or None if the types of the
    matrices differ."""
    same_dtype = all(isinstance(leaf, jax.Array) and leaf.dtype == w.dtype for leaf in (w, *others))
    return jnp.concatenate([w, *others], -1) if same_dtype else None


def aligned_columns(w: jax.Array) -> jax.Array:
    """Returns w [in, out], padded on a GPU with zeros to a multiple of 128 columns.

    The fast GPU kernels of cuBLAS require matrices whose rows are aligned in memory. A training step of GPT-2 124M on
    an H200 took 57.7 ms with a head of 50,257 columns and 43.7 ms with a head of 50,304 columns.
    """
    padding = -w.shape[-1] % _COLUMNS
    return jnp.pad(w, ((0, 0), (0, padding))) if padding and platform() == "gpu" else w


@struct.dataclass
class Transposed:
    """Holds a weight [in, out] in the layout [out, in], which is the fastest layout for few rows of x on a CPU or one
    row on a GPU.

    In the transposed layout, each output of x @ w is a sum over contiguous elements, which XLA computes in one pass.
    For a sum over non-contiguous elements, XLA first writes the terms of the sum to memory in float32.
    """

    w: Any


@matmul.register
def _(leaf: Transposed, x: jax.Array, dtype: str = "float32") -> jax.Array:
    return matmul_transposed(leaf.w, x, dtype)


@dense.register
def _(leaf: Transposed) -> jax.Array:
    return leaf.w.T


def _low_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Returns the matrix product x @ w with bfloat16 operands and float32 accumulation.

    With jax 0.7 on a CPU, the operands are rounded to bfloat16 but multiplied in float32. The multiplication in float32
    avoids an error of XLA in jax 0.7 on CPUs with bfloat16 instructions, where some products of bfloat16 operands with
    a float32 result fail in DotThunk (the message mentions BF16 x BF16 = F32).
    """
    if jax.__version_info__ < (0, 8) and platform() == "cpu":
        x, w = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, w))
        return x @ w
    return _matmul_bfloat16(x, w)


@struct.dataclass
class Gathered:
    """Holds a sharded weight [in, out] that is cast to the dtype of the matrix product and all-gathered before the
    product (FSDP).

    By default, XLA multiplies by each shard of a sharded weight as the shard arrives from another chip, and reads and
    writes the float32 sums [B T, out] of the matrix product once per shard. The memory traffic of reading and writing
    the float32 sums once per shard limits the speed of GPT-2 1558M on eight chips.

    Attributes:
        axes: the mesh axes that shard `w` during the product.
    """

    w: jax.Array
    axes: ProductAxes = struct.field(pytree_node=False)


@matmul.register
def _(leaf: Gathered, x: jax.Array, dtype: str = "float32") -> jax.Array:
    if dtype == "float32":
        return matmul(_with_axes(leaf.w, leaf.axes), x, dtype)
    rows = x.reshape(-1, x.shape[-1])
    return _matmul_bfloat16(rows, leaf.w, leaf.axes).astype(x.dtype).reshape(*x.shape[:-1], leaf.w.shape[1])


def _with_axes(w: jax.Array, axes: ProductAxes) -> jax.Array:
    return w if axes is None else constrain(w, *axes)


def linear(x: jax.Array, kernel: Any, bias: jax.Array | None = None, dtype: str = "float32") -> jax.Array:
    """Computes the linear layer x @ kernel + bias for x [.., in], kernel [in, out] and bias [out]."""
    y = matmul(kernel, x, dtype)
    if bias is None:
        return y
    # The bias is added in float32, so that the gradient of the bias, which is a sum over all tokens, is accumulated in
    # float32.
    return (y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(y.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul_bfloat16(x: jax.Array, w: jax.Array, axes: ProductAxes = None) -> jax.Array:
    """Returns the matrix product x @ w with bfloat16 operands, float32 accumulation and float32 master weights
    (arXiv:1710.03740).

    In the custom backward pass of `_matmul_bfloat16`, the matrix products for the gradients of x and w have bfloat16
    operands, as in the forward pass. Without the custom backward pass, autodiff would multiply by the float32
    cotangent.
    """
    return _forward(x, w, axes)[0]


def _forward(x, w, axes):
    low, low_w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    # For the backward pass, the weight w is saved in the original dtype. If the bfloat16 copy of the weight w were
    # saved, the copies of all scanned layers, all-gathered under FSDP, would stay in memory until the backward pass. On
    # a CPU, the bfloat16 copy of the weight w is saved, because without this copy the CPU backend of XLA would merge
    # the transpose of a tied head with the product for the gradient of x, and cannot compute the merged product.
    saved_w = low_w if platform() == "cpu" else w
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    y = jax.lax.dot_general(low, _with_axes(low_w, axes), dims, preferred_element_type=jnp.float32)
    return y, (low, saved_w, x[:0], w[:0])


def _backward(axes, residual, g):
    x, w, like_x, like_w = residual
    g, low = g.astype(jnp.bfloat16), _with_axes(w.astype(jnp.bfloat16), axes)
    dx = jax.lax.dot_general(g, low, (((g.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    dw = _with_axes(weight_gradient(x, g).astype(like_w.dtype), axes)
    if platform() == "cpu":
        # The optimisation barrier prevents XLA from merging the transpose of a tied head's gradient with the matrix
        # product, because the CPU backend of XLA cannot compute the merged product.
        dw = jax.lax.optimization_barrier(dw)
    return dx.astype(like_x.dtype), dw


_matmul_bfloat16.defvjp(_forward, _backward)


def weight_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """Returns the gradient [in, out] float32 of a weight: x^T g, summed over the leading axes of x [.., in] and g [..,
    out].

    On a CPU, the rows of the input x and of the output gradient g are split into chunks, and the products are summed
    over the chunks and over the rows of a chunk, because XLA computes a sum of bfloat16 products over two axes about
    twice as fast as over one axis.
    """
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    rows = x.shape[0]
    chunks = next(c for c in (8, 4, 2, 1) if rows % c == 0) if platform() == "cpu" else 1
    x, g = (a.reshape(chunks, rows // chunks, -1) for a in (x, g))
    return jnp.einsum("cmk,cmn->kn", x, g, preferred_element_type=jnp.float32)
