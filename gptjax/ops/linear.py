"""Matrix multiplication with any type of weight (array, adapter, quantised matrix), and linear layers."""

from __future__ import annotations

from functools import partial, singledispatch
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gptjax.ops.device import TENSOR, ProductAxes, constrain, platform

_FEW_ROWS = 64  # for up to this many rows of x, a CPU computes (w @ x.T).T faster than x @ w.T
_COLUMNS = 128  # on a GPU, `aligned_columns` pads the columns of a matrix to a multiple of this number


@singledispatch
def matmul(w: Any, x: jax.Array, dtype: str = "float32") -> jax.Array:
    """Multiplies x [.., in] by w [in, out]; the result [.., out] has x's dtype.

    If `dtype` is "bfloat16", both operands are cast to bfloat16; if it is "float32", w is cast to x's dtype. Products
    are accumulated in float32. `matmul` dispatches on the type of `w`: every type of weight other than a plain array
    (an adapter, a quantised matrix) registers its own implementation, so that layers need not know the type.
    """
    rows = x.reshape(-1, x.shape[-1])  # XLA's CPU backend is faster with matrices than with [B, T, ..] arrays
    y = rows @ w.astype(x.dtype) if dtype == "float32" else _low_product(rows, w).astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@singledispatch
def matmul_transposed(w: Any, x: jax.Array, dtype: str = "float32") -> jax.Array:
    """Multiplies x [.., in] by the transpose of w [out, in]; dtypes are treated as in `matmul`.

    Logits are computed with this function if the head shares its weights with the token embeddings.
    """
    rows = x.reshape(-1, x.shape[-1])
    if dtype == "float32":
        # for few rows of x, XLA's CPU backend is twice as fast with the larger operand, w, on the left
        few = isinstance(rows.shape[0], int) and rows.shape[0] <= _FEW_ROWS and platform() == "cpu"
        y = (w.astype(x.dtype) @ rows.T).T if few else rows @ w.astype(x.dtype).T
    else:
        y = _low_product(rows, w.T).astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@singledispatch
def take(w: Any, ids: jax.Array) -> jax.Array:
    """Looks up embeddings: returns the rows [.., D] of w [V, D] at ids [..]; ids out of range are clipped."""
    # the columns of w are not sharded, because with sharded columns XLA would all-gather and reshard the result
    return jnp.take(constrain(w, TENSOR, None), ids, axis=0, mode="clip")


@singledispatch
def dense(w: Any) -> jax.Array:
    """Returns the weight `w` as a plain array."""
    return w


@singledispatch
def factors(w: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns two plain arrays, x' [.., in'] and w' [in', out], whose product x' @ w' equals matmul(w, x).

    `factors` is used in the loss, which computes the product of the hidden states and the LM head in chunks.
    """
    return x, dense(w)


@singledispatch
def transposed(w: Any) -> Any:
    """Returns the weight w [in, out] stored as [out, in], so that each of its columns is contiguous in memory.

    Weights of a type that does not support the transposed layout are returned unchanged.
    """
    return Transposed(w.T) if isinstance(w, jax.Array) and jnp.issubdtype(w.dtype, jnp.floating) else w


@singledispatch
def side_by_side(w: Any, *others: Any) -> Any:
    """Concatenates matrices [.., in, out] with the same `in` along `out`; returns None if their types differ."""
    same_dtype = all(isinstance(leaf, jax.Array) and leaf.dtype == w.dtype for leaf in (w, *others))
    return jnp.concatenate([w, *others], -1) if same_dtype else None


def aligned_columns(w: jax.Array) -> jax.Array:
    """On a GPU, pads w [in, out] with zeros to a multiple of 128 columns.

    The fast GPU kernels of cuBLAS need matrices whose rows are aligned in memory. A training step of GPT-2 124M on an
    H200 took 57.7 ms with 50,257 columns and 43.7 ms with 50,304.
    """
    padding = -w.shape[-1] % _COLUMNS
    return jnp.pad(w, ((0, 0), (0, padding))) if padding and platform() == "gpu" else w


@struct.dataclass
class Transposed:
    """A weight [in, out] stored as [out, in], the fastest layout for few rows of x on a CPU and one row on a GPU.

    In the transposed layout each output of x @ w is a sum over contiguous elements, which XLA computes in one pass; for
    a sum over non-contiguous elements XLA first writes the terms to memory in float32.
    """

    w: Any


@matmul.register
def _(leaf: Transposed, x: jax.Array, dtype: str = "float32") -> jax.Array:
    return matmul_transposed(leaf.w, x, dtype)


@dense.register
def _(leaf: Transposed) -> jax.Array:
    return leaf.w.T


def _low_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiplies x by w with bfloat16 operands and float32 accumulation.

    With jax 0.7 on a CPU, operands are rounded to bfloat16 but multiplied in float32. This avoids an error of XLA on
    CPUs with bfloat16 instructions, where some products of bfloat16 operands with a float32 result fail in DotThunk
    (the message mentions BF16 x BF16 = F32).
    """
    if jax.__version_info__ < (0, 8) and platform() == "cpu":
        x, w = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, w))
        return x @ w
    return _matmul_bfloat16(x, w)


@struct.dataclass
class Gathered:
    """A sharded weight [in, out] that is cast to the product's dtype and all-gathered before the product (FSDP).

    By default XLA multiplies by each shard as it arrives from another chip, and reads and writes the float32 sums
    [B T, out] once per shard; this memory traffic limits the speed of GPT-2 1558M on eight chips.

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
    """Computes x @ kernel + bias, for x [.., in], kernel [in, out] and bias [out]."""
    y = matmul(kernel, x, dtype)
    if bias is None:
        return y
    # the bias is added in float32, so that its gradient, a sum over all tokens, is accumulated in float32
    return (y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(y.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul_bfloat16(x: jax.Array, w: jax.Array, axes: ProductAxes = None) -> jax.Array:
    """Multiplies with bfloat16 operands, float32 accumulation and float32 master weights (arXiv:1710.03740).

    In the custom backward pass, the products for the gradients of x and w have bfloat16 operands too; autodiff would
    multiply by the float32 cotangent.
    """
    return _forward(x, w, axes)[0]


def _forward(x, w, axes):
    low, low_w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    # For the backward pass, w is saved in its own dtype. If the bfloat16 copy were saved, the copies of all scanned
    # layers, all-gathered under FSDP, would stay in memory until the backward pass. On a CPU the copy is saved, because
    # XLA's CPU backend would otherwise merge the transpose of a tied head with the product for the gradient of x, and
    # it cannot compute the merged product.
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
        # prevents XLA from merging the transpose of a tied head's gradient with the matrix product, because XLA's CPU
        # backend cannot compute the merged product
        dw = jax.lax.optimization_barrier(dw)
    return dx.astype(like_x.dtype), dw


_matmul_bfloat16.defvjp(_forward, _backward)


def weight_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """Returns a weight's gradient [in, out] float32: x^T g, summed over the leading axes of x [.., in] and g [.., out].

    On a CPU the rows are split into chunks and summed over two axes, the chunks and the rows of a chunk, because XLA
    computes this sum of bfloat16 products about twice as fast as a sum over one axis.
    """
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    rows = x.shape[0]
    chunks = next(c for c in (8, 4, 2, 1) if rows % c == 0) if platform() == "cpu" else 1
    x, g = (a.reshape(chunks, rows // chunks, -1) for a in (x, g))
    return jnp.einsum("cmk,cmn->kn", x, g, preferred_element_type=jnp.float32)
