"""This module quantises matrices of the parameter tree to int8 (one scale per column) or to NF4 (as in QLoRA).

    params = quantize(params, "nf4")         quantises the weight matrices of all blocks and of the head
    logits = forward(params, tokens, cfg)    needs no change: `ops.linear` dispatches on the type of a leaf

            bits per weight  mean error on normally distributed weights, in standard deviations
    int8    8 + 32 / in      0.007 (in = 1024)
    nf4     4.127            0.073

Every array in a quantised leaf has the same axes as the unquantised matrix, [.., in, out]. In an array with one value
per block of weights, the size of an axis is divided by the block size, for example [.., in / 64, out] for blocks of 64
rows. Because the arrays of a quantised leaf have the axes of the unquantised matrix, `nn.scan`, `vmap` and shardings of
the axis `in` or `out` work on the quantised leaf as on the unquantised matrix.

Quantised weights are frozen: in the matrix product of activations x and a quantised matrix, only x receives a gradient.
The backward pass of a matrix product dequantises the quantised matrix again, so that the forward pass does not save the
float values of the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gptjax import tree
from gptjax.errors import UserError
from gptjax.ops.device import platform
from gptjax.ops.linear import Transposed, dense, matmul, matmul_transposed, side_by_side, take, transposed
from gptjax.ops.precision import custom_vjp
from gptjax.types import Params

_KERNELS = "blocks/*/kernel | lm_head/kernel"
# WORDS maps each word that `quantize` accepts as `spec` to the pattern of the parameters that the word selects.
WORDS = {"int8": f"{_KERNELS} | wte/embedding", "nf4": _KERNELS, "none": "*"}

# LEVELS are the NF4 levels of bitsandbytes, which are quantiles of a normal distribution, scaled to -1..1. The NF4
# level at index 7 is exactly 0.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# NF4 has one absmax (largest magnitude) per _BLOCK weights, and one scale per _GROUP absmaxes.
_BLOCK, _GROUP = 64, 256
_SMALLEST_BLOCK = 16


@struct.dataclass
class Int8:
    """Holds a matrix quantised to int8, whose weights are values * scale.

    The scale of a column is the largest magnitude of the weights in the column, divided by 127.

    Attributes:
        values: quantised weights, [.., in, out] int8.
        scale: one scale per column, [.., 1, out] float32; an embedding table [V, D] has one scale per row, [V, 1].
    """

    values: jax.Array
    scale: jax.Array


@struct.dataclass
class NF4:
    """Holds a matrix quantised to NF4, in which 64 consecutive weights of a column form a block.

    The absmax of a block is the largest magnitude of the weights in the block. A dequantised weight is a level of
    `LEVELS` times the absmax of the weight's block. In addition to the weights, the absmaxes of the blocks are
    quantised (double quantisation).

    Attributes:
        codes: indices into `LEVELS`, two per byte, [.., in/2, out] uint8. The low four bits hold the codes of the first
            32 rows of a block, and the high four bits hold the codes of the last 32 rows.
        absmax: quantised absmaxes, [.., in/64, out] int8. The largest magnitude of the 64 weights of a block is
            absmax * scale + offset.
        scale: one scale per group of 256 neighbouring absmaxes, [.., in/64, out/256] float32.
        offset: mean of all absmaxes of the matrix, [.., 1, 1] float32. If matrices were concatenated along `out`, the
            shape is [.., 1, out], with the mean of the original matrix for each column.

    In an `NF4` matrix, blocks of weights run along the axis `in` and groups of absmaxes along the axis `out`, so that
    both axes can be sharded. In QLoRA, the blocks of weights run along the flattened matrix instead of an axis. If 64
    does not divide `in`, the number of weights in a block is the largest even divisor of `in` below 64. If 256 does not
    divide `out`, the number of absmaxes in a group is the largest divisor of `out` below 256. The size of a block of
    weights and the size of a group of absmaxes are not stored, but computed from the shapes of the arrays.

    Source: QLoRA, arXiv:2305.14314. In contrast to QLoRA, the absmaxes (largest magnitudes of blocks) are quantised to
    int8 instead of FP8, because int8 is more exact for normally distributed weights.
    """

    codes: jax.Array
    absmax: jax.Array
    scale: jax.Array
    offset: jax.Array


@partial(jax.jit, static_argnames="axis")
def int8(w: jax.Array, axis: int = -2) -> Int8:
    """Quantises a matrix, or stacked matrices, to int8.

    All weights along the axis `axis` share one scale. The argument `axis` is -2 for weight matrices [in, out] and -1
    for embedding tables [V, D].
    """
    w = w.astype(jnp.float32)
    scale = jnp.abs(w).max(axis, keepdims=True) / 127
    values = jnp.round(w / jnp.where(scale > 0, scale, 1))
    return Int8(jnp.clip(values, -127, 127).astype(jnp.int8), scale)


@jax.jit
def nf4(w: jax.Array) -> NF4:
    """Quantises a weight matrix [.., in, out] to NF4, where `in` must have an even divisor from 16 to 64."""
    *batch, d_in, d_out = w.shape
    block, group = _block(d_in), _divisor(d_out, _GROUP)
    w = w.astype(jnp.float32).reshape(*batch, d_in // block, block, d_out)
    absmax = jnp.abs(w).max(-2)
    w = w / jnp.where(absmax > 0, absmax, 1)[..., None, :]
    midpoints = [(a + b) / 2 for a, b in pairwise(LEVELS)]
    low, high = jnp.split(sum((w > x).astype(jnp.uint8) for x in midpoints), 2, -2)
    offset = absmax.mean((-2, -1), keepdims=True)
    quantised = int8((absmax - offset).reshape(*batch, d_in // block, d_out // group, group), axis=-1)
    return NF4(
        codes=(low | high << 4).reshape(*batch, d_in // 2, d_out),
        absmax=quantised.values.reshape(absmax.shape),
        scale=quantised.scale[..., 0],
        offset=offset,
    )


def _divisor(size: int, most: int, step: int = 1) -> int:
    """Returns the largest divisor of `size` among `most`, `most - step`, `most - 2 * step` and so on, or 0 if no
    divisor exists."""
    return next((d for d in range(most, 0, -step) if size % d == 0), 0)


def _block(d_in: int) -> int:
    return _divisor(d_in, _BLOCK, 2)


@dense.register
def _(leaf: Int8) -> jax.Array:
    return leaf.values.astype(jnp.float32) * leaf.scale


@dense.register
def _(leaf: NF4) -> jax.Array:
    *batch, half, d_out = leaf.codes.shape
    absmax = _absmax(leaf)
    codes = leaf.codes.reshape(*absmax.shape[:-1], -1, d_out)
    codes = jnp.concatenate([codes & 15, codes >> 4], -2)
    return (_level(codes) * absmax[..., None, :]).reshape(*batch, 2 * half, d_out)


def _absmax(leaf: NF4) -> jax.Array:
    """Returns the dequantised absmaxes of an NF4 matrix, [.., in/64, out] float32."""
    absmax, scale = leaf.absmax.reshape(*leaf.scale.shape, -1), leaf.scale[..., None]
    absmax = absmax.astype(jnp.float32) * scale
    return absmax.reshape(leaf.absmax.shape) + leaf.offset


def _level(codes: jax.Array, levels: tuple[float, ...] = LEVELS) -> jax.Array:
    """Computes `LEVELS[codes]` by nested selects, one select per bit, which accelerators run much faster than a
    gather."""
    if len(levels) == 1:
        return jnp.float32(levels[0])
    half = len(levels) // 2
    return jnp.where(codes & half, _level(codes, levels[half:]), _level(codes, levels[:half]))


@side_by_side.register
def _(leaf: Int8, *others: Any) -> Any:
    if any(not isinstance(other, Int8) for other in others):
        return None
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, -1), leaf, *others)


@side_by_side.register
def _(leaf: NF4, *others: Any) -> Any:
    leaves = (leaf, *others)
    if any(not isinstance(other, NF4) or other.absmax.shape[-2] != leaf.absmax.shape[-2] for other in others):
        return None
    groups = [x.absmax.shape[-1] // x.scale.shape[-1] for x in leaves]
    # In the concatenated NF4 matrix, every group has `group` absmaxes. A group of more than `group` absmaxes is split
    # into groups of `group` absmaxes, each with a copy of the larger group's scale.
    group = math.gcd(*groups)
    return NF4(
        codes=jnp.concatenate([x.codes for x in leaves], -1),
        absmax=jnp.concatenate([x.absmax for x in leaves], -1),
        scale=jnp.concatenate([jnp.repeat(x.scale, n // group, -1) for x, n in zip(leaves, groups, strict=True)], -1),
        offset=jnp.concatenate(
            [jnp.broadcast_to(x.offset, (*x.offset.shape[:-1], x.absmax.shape[-1])) for x in leaves], -1
        ),
    )


@transposed.register
def _(leaf: Int8) -> Any:
    return Transposed(Int8(leaf.values.T, leaf.scale.T)) if platform() == "gpu" else leaf


@struct.dataclass
class NF4Columns:
    """Holds an `NF4` matrix with contiguous columns, for the matrix product with a single row of x on a GPU.

    Attributes:
        codes: indices into `LEVELS`, two per byte, [out, in/64, 32] uint8. The low four bits hold the codes of the
            first 32 weights of a block, and the high four bits hold the codes of the last 32 weights.
        absmax: largest magnitude of the 64 weights of a block, [out, in/64] float32.
    """

    codes: jax.Array
    absmax: jax.Array


@transposed.register
def _(leaf: NF4) -> Any:
    if platform() != "gpu":
        return leaf
    blocks, d_out = leaf.absmax.shape
    return NF4Columns(leaf.codes.reshape(blocks, -1, d_out).transpose(2, 0, 1), _absmax(leaf).T)


@dense.register
def _(leaf: NF4Columns) -> jax.Array:
    codes = jnp.stack([leaf.codes & 15, leaf.codes >> 4], 2)  # The stacked `codes` have the shape [out, in/64, 2, 32].
    return (_level(codes) * leaf.absmax[..., None, None]).reshape(len(leaf.codes), -1).T


@matmul.register
def _(leaf: NF4Columns, x: jax.Array, dtype: str = "float32") -> jax.Array:
    leaf, _ = jax.lax.optimization_barrier((leaf, x))  # see `_frozen`
    if x.size != x.shape[-1]:
        return matmul(dense(leaf).astype(x.dtype), x, dtype)
    low, high = jnp.moveaxis(x.astype(jnp.float32).reshape(leaf.absmax.shape[1], 2, -1), 1, 0)
    # For a single row of x, the NF4 codes are decoded by a gather, because XLA would compute the selects of `_level` in
    # a separate GPU kernel.
    levels = jnp.array(LEVELS)
    low_levels, high_levels = (levels.at[i].get(mode="promise_in_bounds") for i in (leaf.codes & 15, leaf.codes >> 4))
    y = low_levels * low + high_levels * high
    return (y * leaf.absmax[..., None]).sum((1, 2)).astype(x.dtype).reshape(*x.shape[:-1], -1)


@take.register
def _(leaf: Int8, ids: jax.Array) -> jax.Array:
    values, scale = take(leaf.values, ids), take(leaf.scale, ids)
    return values.astype(jnp.float32) * scale


@matmul.register
def _(leaf: Int8 | NF4, x: jax.Array, dtype: str = "float32") -> jax.Array:
    return _frozen(matmul, leaf, x, dtype)


@matmul_transposed.register
def _(leaf: Int8 | NF4, x: jax.Array, dtype: str = "float32") -> jax.Array:
    return _frozen(matmul_transposed, leaf, x, dtype)


_GRADIENT_PRODUCT = {matmul: matmul_transposed, matmul_transposed: matmul}


@partial(custom_vjp, nondiff_argnums=(0, 3))
def _frozen(product, leaf, x, dtype):
    """Returns product(leaf, x), where `product` is `matmul` or `matmul_transposed`, differentiable in x only."""
    # Without the optimisation barrier, XLA might dequantise all layers before a decoding loop, and hold the float
    # weights in memory.
    leaf, _ = jax.lax.optimization_barrier((leaf, x))
    if isinstance(leaf, NF4):
        return product(dense(leaf).astype(x.dtype), x, dtype)
    scale = leaf.scale if product is matmul else leaf.scale.T
    if scale.shape[0] == 1:
        return (_integers(product, leaf.values, x, dtype).astype(jnp.float32) * scale[0]).astype(x.dtype)
    return _integers(product, leaf.values, (x.astype(jnp.float32) * scale[:, 0]).astype(x.dtype), dtype)


def _forward(product, leaf, x, dtype):
    return _frozen(product, leaf, x, dtype), leaf


def _backward(product, dtype, leaf, g):
    return None, _frozen(_GRADIENT_PRODUCT[product], leaf, g, dtype)


_frozen.defvjp(_forward, _backward)


def _integers(product: Callable[..., jax.Array], values: jax.Array, x: jax.Array, dtype: str) -> jax.Array:
    """Computes the matrix product of x and an int8 matrix without applying the quantisation scales.

    The int8 matrix is cast to the dtype of x. A cast from int8 is exact even if x is bfloat16.
    """
    values = values.astype(x.dtype)
    if x.size == x.shape[-1] and platform() in ("cpu", "gpu"):
        # The product of an int8 matrix and one row of x is written as a sum, which XLA computes directly from the
        # integers. For a matrix product, XLA might first convert the whole int8 matrix to floats in memory.
        values, row = values.astype(jnp.float32), x.reshape(-1).astype(jnp.float32)
        y = (values * row[:, None]).sum(0) if product is matmul else (values * row).sum(1)
        return y.astype(x.dtype).reshape(*x.shape[:-1], -1)
    return product(values, x, dtype)


def quantize(params: Params, spec: str | tuple[tuple[str, str], ...] = "int8") -> Params:
    """Returns the parameter tree with matrices quantised to `Int8` or `NF4` leaves, one matrix at a time.

    Args:
        spec: "nf4" quantises the weight matrices (the parameters named kernel) of all blocks and of an untied head.
            "int8" quantises the same weight matrices and the token embedding. To choose the quantisation of each
            parameter, pass pairs (pattern, "int8" | "nf4" | "none"); see `gptjax.tree` for patterns. A parameter gets
            the quantisation of the first pair whose pattern matches its path, and is unchanged if no pattern matches.
            Weight matrices can be int8 or nf4, embeddings only int8, and other parameters cannot be quantised.

    Raises:
        UserError: a leaf is not a plain array, a pattern matches no parameter, the name of a quantisation is unknown,
            or a parameter does not support its quantisation. The error message lists all problems.
    """
    if isinstance(spec, str):
        if spec not in WORDS:
            raise UserError(f"quantize: expected {', '.join(WORDS)}, or pairs (pattern, kind); got {spec!r}")
        spec = ((WORDS[spec], spec),)
    leaves = tree.flatten_nodes(params)
    problems = [
        f"{path} is {type(leaf).__name__}, not a plain array: quantize the parameters before anything else"
        for path, leaf in leaves.items()
        if not isinstance(leaf, jax.Array | np.ndarray)
    ]
    for pattern, kind in spec:
        if kind not in WORDS:
            problems.append(f"{pattern!r}: expected {', '.join(WORDS)}; got {kind!r}")
        if not any(tree.matches(pattern, path) for path in leaves):
            problems.append(f"{pattern!r} matches no parameter; there are {', '.join(leaves)}")
    kinds = {path: tree.first_match(path, spec) or "none" for path in leaves}
    problems = problems or [p for path, kind in kinds.items() if (p := _misfit(path, leaves[path].shape, kind))]
    if problems:
        raise UserError.all(problems)
    return tree.map_paths(lambda path, leaf: _quantized(path, leaf, kinds[path]), params)


def _quantized(path: str, leaf: jax.Array, kind: str) -> Any:
    if kind == "none":
        return leaf
    return nf4(leaf) if kind == "nf4" else int8(leaf, axis=-1 if path.endswith("/embedding") else -2)


def _misfit(path: str, shape: tuple[int, ...], kind: str) -> str | None:
    """Returns the reason why a parameter cannot be quantised to `kind` ("int8" or "nf4"), or None if the quantisation
    is possible."""
    last = path.split("/")[-1]
    if kind != "none" and last not in ("kernel", "embedding"):
        return f"{path} cannot be {kind}, which is for kernels and embeddings: narrow the pattern"
    if kind == "nf4" and last == "embedding":
        return f"{path} cannot be nf4, whose blocks span several rows: use int8, which has one scale per row"
    if kind == "nf4" and _block(shape[-2]) < _SMALLEST_BLOCK:
        return (
            f"{path} [.., {shape[-2]}, {shape[-1]}] cannot be nf4: {shape[-2]} rows have no even divisor from "
            f"{_SMALLEST_BLOCK} to {_BLOCK} for the blocks; use int8, which supports any size"
        )
    return None


_dense = jax.jit(dense)


def dequantize(params: Params) -> Params:
    """Returns the parameter tree with all quantised leaves converted back to plain float32 arrays."""
    return jax.tree.map(
        lambda leaf: _dense(leaf) if isinstance(leaf, Int8 | NF4) else leaf,
        params,
        is_leaf=lambda node: isinstance(node, Int8 | NF4),
    )
