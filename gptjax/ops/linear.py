"""One product with a weight, whatever the weight is, and the affine map around it."""

from __future__ import annotations

from functools import partial, singledispatch
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gptjax.ops.device import TENSOR, ProductAxes, constrain, platform

_FEW_ROWS = 64
_COLUMNS = 128


@singledispatch
def matmul(w: Any, x: jax.Array, dtype: str = "float32") -> jax.Array:
    """x [.., in] times w [in, out] -> [.., out] in x's dtype, the product in `dtype`, summed in float32.

    Dispatches on the type of `w`, so a leaf that is not a plain array (an adapter, a quantised matrix) brings its
    own product and no layer hears of it.
    """
    rows = x.reshape(-1, x.shape[-1])  # as matrices: XLA's CPU backend multiplies them faster than [B, T, ..]
    y = rows @ w.astype(x.dtype) if dtype == "float32" else _low_product(rows, w).astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@singledispatch
def matmul_transposed(w: Any, x: jax.Array, dtype: str = "float32") -> jax.Array:
    """x [.., in] times w.T, w [out, in] -> [.., out]: a tied head with its embedding table. Otherwise as `matmul`."""
    rows = x.reshape(-1, x.shape[-1])
    if dtype == "float32":
        # few rows: XLA's CPU backend is twice as fast with the large operand on the left
        few = isinstance(rows.shape[0], int) and rows.shape[0] <= _FEW_ROWS and platform() == "cpu"
        y = (w.astype(x.dtype) @ rows.T).T if few else rows @ w.astype(x.dtype).T
    else:
        y = _low_product(rows, w.T).astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@singledispatch
def take(w: Any, ids: jax.Array) -> jax.Array:
    """Rows of a table w [V, D] by ids [..] -> [.., D]; an id out of range counts as the nearest."""
    # whole rows: to look up what is cut by columns, XLA would gather the result and cut it anew
    return jnp.take(constrain(w, TENSOR, None), ids, axis=0, mode="clip")


@singledispatch
def dense(w: Any) -> jax.Array:
    """The plain array that a leaf stands for."""
    return w


@singledispatch
def factors(w: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x', w') [.., in'] and [in', out], plain arrays whose product is that of `x` and the leaf: for a product that is
    taken in pieces, such as the head's in the loss."""
    return x, dense(w)


@singledispatch
def transposed(w: Any) -> Any:
    """The leaf of a kernel [in, out] stored as [out, in], each column contiguous; or the leaf as it is."""
    return Transposed(w.T) if isinstance(w, jax.Array) and jnp.issubdtype(w.dtype, jnp.floating) else w


@singledispatch
def side_by_side(w: Any, *others: Any) -> Any:
    """Matrices [.., in, out] with the same `in` as one leaf [.., in, sum of out], whose product is theirs one beside
    the other; None where there is no such leaf."""
    plain = all(isinstance(leaf, jax.Array) and leaf.dtype == w.dtype for leaf in (w, *others))
    return jnp.concatenate([w, *others], -1) if plain else None


def aligned_columns(w: jax.Array) -> jax.Array:
    """w [in, out], on a GPU padded with zeros to a multiple of 128 columns: cuBLAS's fast kernels need aligned rows.
    GPT-2 124M's training step on an H200 took 57.7 ms with 50,257 columns and 43.7 ms with 50,304."""
    odd = -w.shape[-1] % _COLUMNS
    return jnp.pad(w, ((0, 0), (0, odd))) if odd and platform() == "gpu" else w


@struct.dataclass
class Transposed:
    """A kernel [in, out] kept as [out, in]: how a CPU reads it fastest for a few rows, and a GPU for one, where sums
    over what lies together take one pass and others are written out in float32 first."""

    w: Any


@matmul.register
def _(leaf: Transposed, x: jax.Array, dtype: str = "float32") -> jax.Array:
    return matmul_transposed(leaf.w, x, dtype)


@dense.register
def _(leaf: Transposed) -> jax.Array:
    return leaf.w.T


def _low_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x times w in bfloat16, summed in float32. jax 0.7's XLA refuses some such products on CPUs that have the units
    for them (DotThunk: BF16 x BF16 = F32): there the rounded numbers are multiplied in float32."""
    if jax.__version_info__ < (0, 8) and platform() == "cpu":
        x, w = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, w))
        return x @ w
    return _matmul_bfloat16(x, w)


@struct.dataclass
class Gathered:
    """A kernel [in, out] that a mesh keeps in pieces, and that is put together in the product's dtype for the product.

    Left alone XLA multiplies piece by piece as they come from the other chips, and reads and writes the float32 sums
    [B T, out] once a piece: GPT-2 1558M on eight chips is bound by that traffic.
    """

    w: jax.Array
    axes: ProductAxes = struct.field(pytree_node=False)


@matmul.register
def _(leaf: Gathered, x: jax.Array, dtype: str = "float32") -> jax.Array:
    if dtype == "float32":
        return matmul(_laid(leaf.w, leaf.axes), x, dtype)
    rows = x.reshape(-1, x.shape[-1])
    return _matmul_bfloat16(rows, leaf.w, leaf.axes).astype(x.dtype).reshape(*x.shape[:-1], leaf.w.shape[1])


def _laid(w: jax.Array, axes: ProductAxes) -> jax.Array:
    return w if axes is None else constrain(w, *axes)


def linear(x: jax.Array, kernel: Any, bias: jax.Array | None = None, dtype: str = "float32") -> jax.Array:
    """x @ kernel + bias; kernel [in, out], bias [out]."""
    y = matmul(kernel, x, dtype)
    if bias is None:
        return y
    # in float32, or the gradient of the bias, a sum over all tokens, would be summed in bfloat16
    return (y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(y.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul_bfloat16(x: jax.Array, w: jax.Array, axes: ProductAxes = None) -> jax.Array:
    """bfloat16 operands, float32 sums: mixed precision with float32 master weights (arXiv:1710.03740).

    The backward pass is written out so that all three products take bfloat16 operands; autodiff would multiply the
    float32 cotangent with them instead.
    """
    return _forward(x, w, axes)[0]


def _forward(x, w, axes):
    low, low_w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    # Save w in its own dtype: a bfloat16 copy per scanned layer would stay alive (and be all-gathered under FSDP). Not
    # on a CPU, where XLA would fold the transpose of a tied head into the backward product and refuse it
    kept = low_w if platform() == "cpu" else w
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    y = jax.lax.dot_general(low, _laid(low_w, axes), dims, preferred_element_type=jnp.float32)
    return y, (low, kept, x[:0], w[:0])


def _backward(axes, residual, g):
    x, w, like_x, like_w = residual
    g, low = g.astype(jnp.bfloat16), _laid(w.astype(jnp.bfloat16), axes)
    dx = jax.lax.dot_general(g, low, (((g.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    dw = _laid(weight_gradient(x, g).astype(like_w.dtype), axes)
    if platform() == "cpu":  # a tied head's gradient is transposed, and XLA refuses that inside the product
        dw = jax.lax.optimization_barrier(dw)
    return dx.astype(like_x.dtype), dw


_matmul_bfloat16.defvjp(_forward, _backward)


def weight_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """x [.., in], g [.., out] -> sum over the leading axes of x^T g, [in, out] float32.

    On a CPU the sum runs over two axes: XLA then multiplies bfloat16 about twice as fast as over one.
    """
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    rows = x.shape[0]
    parts = next(c for c in (8, 4, 2, 1) if rows % c == 0) if platform() == "cpu" else 1
    x, g = (a.reshape(parts, rows // parts, -1) for a in (x, g))
    return jnp.einsum("cmk,cmn->kn", x, g, preferred_element_type=jnp.float32)
