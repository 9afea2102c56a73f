"""Matrices in few bits, as leaves of the parameter tree: int8 with a scale a column, and QLoRA's NF4.

    params = quantize(params, "nf4")         the kernels of blocks and head; everything else stays as it is
    logits = forward(params, tokens, cfg)    no layer hears of it: `ops.linear` dispatches on the leaf

            bits a number    mean error of normal weights, in standard deviations
    int8    8 + 32 / in      0.007 (in = 1024)
    nf4     4.127            0.073

Every array in a leaf keeps the matrix's axes [.., in, out], shorter where one number serves a block: `nn.scan` slices
a stack of leaves, `vmap` maps it and a sharding of `in` or `out` splits it as it does the matrix.

A leaf is frozen: gradients flow to x alone, and the backward pass makes the floats again instead of keeping them.
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
WORDS = {"int8": f"{_KERNELS} | wte/embedding", "nf4": _KERNELS, "none": "*"}  # what a spec of one word means

# bitsandbytes' levels of NF4: quantiles of a normal distribution, the outermost at 1, one of them exactly 0
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_BLOCK, _GROUP = 64, 256  # numbers that share an absmax, absmaxes that share a scale
_SMALLEST_BLOCK = 16


@struct.dataclass
class Int8:
    """values * scale, the scale its column's largest magnitude / 127; a table of rows has one for each row instead.

    values  [.., in, out] int8
    scale   [.., 1, out] float32; of a table [V, D]: [V, 1]
    """

    values: jax.Array
    scale: jax.Array


@struct.dataclass
class NF4:
    """A level of `LEVELS` times its block's absmax, which is itself kept in int8: double quantisation.

    codes   [.., in/2, out] uint8      of a block's 64 rows the first 32 in the low four bits, the others in the high
    absmax  [.., in/64, out] int8      times scale plus offset: the largest magnitude of 64 numbers of one column
    scale   [.., in/64, out/256] f32   of 256 neighbouring absmaxes
    offset  [.., 1, 1] f32             their mean over the matrix; [.., 1, out] of matrices that were joined

    QLoRA runs its blocks along the flattened matrix; along `in` and `out` they let both axes be sharded. Where 64 or
    256 do not divide an axis, the largest number below that does takes their place; the shapes tell which.
    Source: arXiv:2305.14314, with int8 for its FP8, which is finer for the absmaxes of normal weights.
    """

    codes: jax.Array
    absmax: jax.Array
    scale: jax.Array
    offset: jax.Array


@partial(jax.jit, static_argnames="axis")
def int8(w: jax.Array, axis: int = -2) -> Int8:
    """A matrix or a stack of them with one scale for all numbers along `axis`: -2 for a kernel, -1 for a table."""
    w = w.astype(jnp.float32)
    scale = jnp.abs(w).max(axis, keepdims=True) / 127
    values = jnp.round(w / jnp.where(scale > 0, scale, 1))
    return Int8(jnp.clip(values, -127, 127).astype(jnp.int8), scale)


@jax.jit
def nf4(w: jax.Array) -> NF4:
    """A kernel [.., in, out], whose `in` has an even divisor between 16 and 64."""
    *lead, d_in, d_out = w.shape
    block, group = _block(d_in), _divisor(d_out, _GROUP)
    w = w.astype(jnp.float32).reshape(*lead, d_in // block, block, d_out)
    absmax = jnp.abs(w).max(-2)
    w = w / jnp.where(absmax > 0, absmax, 1)[..., None, :]
    between = [(a + b) / 2 for a, b in pairwise(LEVELS)]
    low, high = jnp.split(sum((w > x).astype(jnp.uint8) for x in between), 2, -2)
    offset = absmax.mean((-2, -1), keepdims=True)
    second = int8((absmax - offset).reshape(*lead, d_in // block, d_out // group, group), axis=-1)
    return NF4(
        codes=(low | high << 4).reshape(*lead, d_in // 2, d_out),
        absmax=second.values.reshape(absmax.shape),
        scale=second.scale[..., 0],
        offset=offset,
    )


def _divisor(size: int, most: int, step: int = 1) -> int:
    """The largest divisor of `size` up to `most`, of the multiples of `step`; 0 where there is none."""
    return next((d for d in range(most, 0, -step) if size % d == 0), 0)


def _block(d_in: int) -> int:
    return _divisor(d_in, _BLOCK, 2)


@dense.register
def _(leaf: Int8) -> jax.Array:
    return leaf.values.astype(jnp.float32) * leaf.scale


@dense.register
def _(leaf: NF4) -> jax.Array:
    *lead, half, d_out = leaf.codes.shape
    absmax = _absmax(leaf)
    codes = leaf.codes.reshape(*absmax.shape[:-1], -1, d_out)
    codes = jnp.concatenate([codes & 15, codes >> 4], -2)
    return (_level(codes) * absmax[..., None, :]).reshape(*lead, 2 * half, d_out)


def _absmax(leaf: NF4) -> jax.Array:
    """[.., in/64, out] float32."""
    absmax, scale = leaf.absmax.reshape(*leaf.scale.shape, -1), leaf.scale[..., None]
    absmax = absmax.astype(jnp.float32) * scale
    return absmax.reshape(leaf.absmax.shape) + leaf.offset


def _level(codes: jax.Array, levels: tuple[float, ...] = LEVELS) -> jax.Array:
    """LEVELS[codes], bit by bit: accelerators select much faster than they look up."""
    if len(levels) == 1:
        return jnp.float32(levels[0])
    half = len(levels) // 2
    return jnp.where(codes & half, _level(codes, levels[half:]), _level(codes, levels[:half]))


@side_by_side.register
def _(leaf: Int8, *others: Any) -> Any:
    if any(not isinstance(other, Int8) for other in others):
        return None
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, -1), leaf, *others)


@side_by_side.register
def _(leaf: NF4, *others: Any) -> Any:
    leaves = (leaf, *others)
    if any(not isinstance(other, NF4) or other.absmax.shape[-2] != leaf.absmax.shape[-2] for other in others):
        return None
    groups = [part.absmax.shape[-1] // part.scale.shape[-1] for part in leaves]
    group = math.gcd(*groups)  # what they can all have: a scale of a larger one is repeated
    return NF4(
        codes=jnp.concatenate([part.codes for part in leaves], -1),
        absmax=jnp.concatenate([part.absmax for part in leaves], -1),
        scale=jnp.concatenate([jnp.repeat(a.scale, n // group, -1) for a, n in zip(leaves, groups, strict=True)], -1),
        offset=jnp.concatenate(
            [jnp.broadcast_to(a.offset, (*a.offset.shape[:-1], a.absmax.shape[-1])) for a in leaves], -1
        ),
    )


@transposed.register
def _(leaf: Int8) -> Any:
    return Transposed(Int8(leaf.values.T, leaf.scale.T)) if platform() == "gpu" else leaf


@struct.dataclass
class NF4Columns:
    """An `NF4` kernel with the numbers of one column together, for one row at a time.

    codes   [out, in/64, 32] uint8    of a block's 64 numbers the first 32 in the low four bits, the others in the high
    absmax  [out, in/64] float32
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
    both = jnp.stack([leaf.codes & 15, leaf.codes >> 4], 2)  # [out, in/64, 2, 32]
    return (_level(both) * leaf.absmax[..., None, None]).reshape(len(leaf.codes), -1).T


@matmul.register
def _(leaf: NF4Columns, x: jax.Array, dtype: str = "float32") -> jax.Array:
    leaf, _ = jax.lax.optimization_barrier((leaf, x))  # as in `_frozen`
    if x.size != x.shape[-1]:
        return matmul(dense(leaf).astype(x.dtype), x, dtype)
    low, high = jnp.moveaxis(x.astype(jnp.float32).reshape(leaf.absmax.shape[1], 2, -1), 1, 0)
    levels = jnp.array(LEVELS)  # looked up: of all those selects XLA would make a kernel of its own
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


_BACK = {matmul: matmul_transposed, matmul_transposed: matmul}


@partial(custom_vjp, nondiff_argnums=(0, 3))
def _frozen(product, leaf, x, dtype):
    # tied to x, or XLA makes the floats of all layers once before a decoding loop, and keeps them
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
    return None, _frozen(_BACK[product], leaf, g, dtype)


_frozen.defvjp(_forward, _backward)


def _integers(product: Callable[..., jax.Array], values: jax.Array, x: jax.Array, dtype: str) -> jax.Array:
    """x with a matrix of int8, which bfloat16 holds exactly."""
    values = values.astype(x.dtype)
    if x.size == x.shape[-1] and platform() in ("cpu", "gpu"):
        # one row: a sum that reads the integers, where a product might read a float matrix that was made of them
        values, row = values.astype(jnp.float32), x.reshape(-1).astype(jnp.float32)
        y = (values * row[:, None]).sum(0) if product is matmul else (values * row).sum(1)
        return y.astype(x.dtype).reshape(*x.shape[:-1], -1)
    return product(values, x, dtype)


def quantize(params: Params, spec: str | tuple[tuple[str, str], ...] = "int8") -> Params:
    """The same tree with matrices as `Int8` or `NF4` leaves, made one at a time; see `gptjax.tree` for patterns.

    Args:
        spec: "nf4" for the kernels of all blocks and of an untied head, "int8" for those and the token embedding; or
            pairs (pattern, "int8" | "nf4" | "none"), of which the first that matches a path decides; what none
            matches stays as it is. Kernels and embeddings can be int8, kernels nf4.

    Raises:
        UserError: a leaf that is no plain array, a pattern that matches nothing, an unknown kind, a parameter that
            its kind does not fit; all of them at once.
    """
    if isinstance(spec, str):
        if spec not in WORDS:
            raise UserError(f"quantize: expected {', '.join(WORDS)}, or pairs (pattern, kind); got {spec!r}")
        spec = ((WORDS[spec], spec),)
    leaves = tree.flatten_nodes(params)
    problems = [
        f"{path} is {type(leaf).__name__}, not a plain array: quantize plain parameters, before anything else"
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
    """Why this parameter cannot be of this kind."""
    last = path.split("/")[-1]
    if kind != "none" and last not in ("kernel", "embedding"):
        return f"{path} cannot be {kind}, which is for kernels and embeddings: narrow the pattern"
    if kind == "nf4" and last == "embedding":
        return f"{path} cannot be nf4, whose blocks lie across the rows: int8 keeps a scale for each row"
    if kind == "nf4" and _block(shape[-2]) < _SMALLEST_BLOCK:
        return (
            f"{path} [.., {shape[-2]}, {shape[-1]}] cannot be nf4: {shape[-2]} rows have no even divisor from "
            f"{_SMALLEST_BLOCK} to {_BLOCK} for the blocks; int8 takes any size"
        )
    return None


_dense = jax.jit(dense)


def dequantize(params: Params) -> Params:
    """Plain arrays again, float32, of all quantised leaves; the others stay as they are."""
    return jax.tree.map(
        lambda leaf: _dense(leaf) if isinstance(leaf, Int8 | NF4) else leaf,
        params,
        is_leaf=lambda node: isinstance(node, Int8 | NF4),
    )
