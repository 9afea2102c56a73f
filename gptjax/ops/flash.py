"""This module implements flash attention for NVIDIA GPUs from Ampere on, as Pallas kernels that Triton compiles.

The flash-attention kernels support causal masks, document masks, sliding windows, grouped-query attention and rows of
any length. The size of the sliding window may be a tracer, so that the window size can differ between scanned layers.
The flash-attention kernels compute the attention scores tile by tile, never store the scores in GPU memory, and skip
fully masked tiles.

Source: arXiv:2205.14135 (FlashAttention). The backward pass of flash attention has two kernels, as in arXiv:2307.08691,
section 3 (FlashAttention-2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

from gptjax.ops.precision import default_precision

# _MASKED is the score of a masked key. The masked score is finite, because a score of -inf would make the softmax of a
# query NaN if a tile contains only masked keys. With a finite masked score, the softmax sums of a fully masked tile are
# wrong, but the wrong sums are multiplied by 0 as soon as a later tile has a key that the query attends to.
_MASKED = -1e30
# The flash-attention kernels multiply attention scores by log2(e), because exp(x) = exp2(x log2(e)) and exp2 is a
# single GPU instruction.
_LOG2E = math.log2(math.e)


class Tile(NamedTuple):
    """Holds the tile sizes of a Triton program in queries and keys per iteration, and the numbers of warps and pipeline
    stages."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


class Tiles(NamedTuple):
    forward: Tile
    d_q: Tile
    d_kv: Tile


# _TILES maps each pair (number of columns of a tile, bytes per element) to tile sizes. For compute capabilities 8.0 to
# 10.0, Triton compiles kernels with the tile sizes in _TILES without spilling registers in a loop and within 99 KiB of
# shared memory, which is the limit of the capabilities 8.6 and 8.9. The speed of the kernels with the tile sizes in
# _TILES was not measured.
_TILES = {
    (64, 2): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8), Tile(64, 64)),
    (128, 2): Tiles(Tile(128, 64, 8), Tile(128, 32, 8), Tile(32, 64)),
    (256, 2): Tiles(Tile(64, 32, 8), Tile(32, 32), Tile(32, 32, 8)),
    (64, 4): Tiles(Tile(64, 64), Tile(64, 32), Tile(64, 32)),
    (128, 4): Tiles(Tile(64, 32, 8), Tile(32, 32), Tile(32, 32)),
    (256, 4): Tiles(Tile(32, 16), Tile(16, 16), Tile(16, 16)),
}


def default_tiles(head_dim: int, dtype: DTypeLike) -> Tiles:
    """Returns the tile sizes of the forward and backward kernels for the given head size and dtype."""
    return _TILES[max(64, pl.next_power_of_2(head_dim)), jnp.dtype(dtype).itemsize]


class _Static(NamedTuple):
    tiles: Tiles
    windowed: bool
    precision: str | None
    saved_as: str
    interpret: bool


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    offset: int | jax.Array = 0,
    window: int | jax.Array = 0,
    tiles: Tiles | None = None,
    saved_as: str = "attention",
    interpret: bool = False,
) -> jax.Array:
    """Computes causal attention, softmax(q k^T + mask) v, in which a query attends to the keys up to the query's
    position.

    Args:
        q: queries [B, T, N, H], already multiplied by the softmax scale.
        k, v: keys and values [B, S, K, H]; query head n attends to key head n // (N // K).
        segment_ids: document ids of the queries [B, T] and of the keys [B, S]; a query attends only to keys of the same
            document.
        offset: position of the first query among the keys; offset + T <= S.
        window: size of the sliding window, which is the number of keys that a query attends to, including the key at
            the query's own position. 0: no window.
        tiles: tile sizes of the kernels, or None for the tile sizes that `default_tiles` returns.
        saved_as: name that `jax.ad_checkpoint.checkpoint_name` gives to the output and to the log-sum-exp, which the
            backward pass needs.
        interpret: whether to run the kernels in the interpreter of Pallas on a CPU, for tests.

    Returns:
        the attention output [B, T, N, H] in the dtype of q. The scores, the softmax and the accumulation of matrix
        products are float32.
    """
    T, S = q.shape[1], k.shape[1]
    q_ids, k_ids = (None, None) if segment_ids is None else (x.astype(jnp.int32) for x in segment_ids)
    windowed = not isinstance(window, int) or 0 < window < S
    window = jnp.where(jnp.asarray(window) > 0, window, S)
    span = jnp.stack([jnp.asarray(offset, jnp.int32), window.astype(jnp.int32)])
    # The matmul precision is read before the backward pass, because the backward pass is traced outside the context
    # manager that sets the precision.
    precision = default_precision()

    # `at_most` limits the size of a tile to the row length n, rounded up to a power of two of at least 16, which tensor
    # cores require.
    def at_most(size: int, n: int) -> int:
        return min(size, max(16, pl.next_power_of_2(n)))

    tiles = Tiles(*(
        tile._replace(queries=at_most(tile.queries, T), keys=at_most(tile.keys, S))
        for tile in tiles or default_tiles(q.shape[-1], q.dtype)
    ))  # fmt: skip
    return _attention(q, k, v, q_ids, k_ids, span, _Static(tiles, windowed, precision, saved_as, interpret))


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, q_ids, k_ids, span, static):
    return _forward(q, k, v, q_ids, k_ids, span, static)[0]


def _attention_forward(q, k, v, q_ids, k_ids, span, static):
    out, lse = (checkpoint_name(x, static.saved_as) for x in _forward(q, k, v, q_ids, k_ids, span, static))
    return out, (q, k, v, q_ids, k_ids, span, out, lse)


def _attention_backward(static, residual, d_out):
    """Computes the gradients of causal attention with respect to q, k and v.

    The gradient of the attention scores is p (d_p - sum_s p d_p), where p are the attention weights and d_p is the
    gradient of p. The sum over the keys of the attention weights times their gradients equals the dot product of the
    attention output and the gradient of the attention output, and is computed as this dot product (arXiv:2205.14135,
    appendix B).
    """
    q, k, v, q_ids, k_ids, span, out, lse = residual
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).transpose(0, 2, 1)
    sizes, inputs = _Sizes.of(q, k), [span, q_ids, k_ids, q, k, v, d_out, lse, delta]

    def run(kernel, tile, layout, loop_over, results):
        ranges = _ranges(sizes, tile, span, q_ids, k_ids, static.windowed, loop_over=loop_over)
        specs = layout(sizes, tile, len(ranges))
        in_specs = [
            specs.ranges, specs.span, specs.q_ids, specs.k_ids, specs.q, specs.kv, specs.kv, specs.q, specs.stat,
            specs.stat,
        ]  # fmt: skip
        out_specs = [specs.q if x is q else specs.kv for x in results]
        return _call(kernel, sizes, tile, static, specs, [ranges, *inputs], in_specs, results, out_specs)

    d_q = run(_d_q_kernel, static.tiles.d_q, _by_query, "keys", [q])
    d_kv = run(_d_kv_kernel, static.tiles.d_kv, _by_key, "queries", [k, v])
    return *d_q, *d_kv, None, None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _forward(q, k, v, q_ids, k_ids, span, static):
    """Returns the attention output, and the array [B, N, T] float32 of log2(sum_s exp(score_s)) over the keys s."""
    sizes, tile = _Sizes.of(q, k), static.tiles.forward
    ranges = _ranges(sizes, tile, span, q_ids, k_ids, static.windowed)
    specs = _by_query(sizes, tile, len(ranges))
    lse = jax.ShapeDtypeStruct((sizes.B, sizes.N, sizes.T), jnp.float32)
    inputs = [ranges, span, q_ids, k_ids, q, k, v]
    in_specs = [specs.ranges, specs.span, specs.q_ids, specs.k_ids, specs.q, specs.kv, specs.kv]
    return _call(_forward_kernel, sizes, tile, static, specs, inputs, in_specs, [q, lse], [specs.q, specs.stat])


def _call(kernel, sizes, tile, static, specs, inputs, in_specs, results, out_specs):
    present = [x is not None for x in inputs]

    # `named` passes None to the kernel for inputs that are absent, such as the segment ids of rows without documents.
    def named(*refs):
        rest = iter(refs)
        kernel(
            *(next(rest) if is_present else None for is_present in present),
            *rest,
            sizes=sizes,
            tile=tile,
            static=static,
        )

    named.__name__ = kernel.__name__.strip("_")
    return pl.pallas_call(
        named,
        grid=specs.programs,
        in_specs=[spec for spec, is_present in zip(in_specs, present, strict=True) if is_present],
        out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=static.interpret,
        name="flash_" + named.__name__.removesuffix("_kernel"),
    )(*(x for x in inputs if x is not None))


# The following functions compute ranges of tiles and Pallas block specs.


class _Sizes(NamedTuple):
    B: int
    T: int
    S: int
    N: int
    K: int
    H: int

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array) -> _Sizes:
        return cls(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])

    @property
    def width(self) -> int:
        """Returns the number of columns of a tile: the head size H, rounded up to a power of two of at least 16.

        For the head size H, the columns of a tile beyond the first H columns hold zeros.
        """
        return max(16, pl.next_power_of_2(self.H))

    @property
    def group(self) -> int:
        return self.N // self.K

    def padded(self, tile: Tile) -> tuple[int, int]:
        return pl.cdiv(self.T, tile.queries) * tile.queries, pl.cdiv(self.S, tile.keys) * tile.keys


class _Layout(NamedTuple):
    """Holds the grid of Triton programs of a kernel, and for each array the block that one Triton program reads or
    writes."""

    programs: tuple[int, int, int]
    ranges: pl.BlockSpec
    span: pl.BlockSpec
    q_ids: pl.BlockSpec
    k_ids: pl.BlockSpec
    q: pl.BlockSpec
    kv: pl.BlockSpec
    stat: pl.BlockSpec  # [B, N, T]


def _by_query(sizes: _Sizes, tile: Tile, n_ranges: int) -> _Layout:
    """Returns the layout of kernels with one Triton program per query head and tile of queries.

    Each Triton program loops over the tiles of keys. The Triton program for the last tile of queries starts first,
    because the last queries attend to the most keys.
    """
    n, (_, S) = pl.cdiv(sizes.T, tile.queries), sizes.padded(tile)

    def row(b):
        return b if n_ranges > 1 else 0

    return _Layout(
        (n, sizes.N, sizes.B),
        pl.BlockSpec((None, None, 4), lambda i, h, b: (row(b), n - 1 - i, 0)),
        pl.BlockSpec((2,), lambda i, h, b: (0,)),
        pl.BlockSpec((None, tile.queries), lambda i, h, b: (b, n - 1 - i)),
        pl.BlockSpec((None, S), lambda i, h, b: (b, 0)),
        pl.BlockSpec((None, tile.queries, None, sizes.width), lambda i, h, b: (b, n - 1 - i, h, 0)),
        pl.BlockSpec((None, S, None, sizes.width), lambda i, h, b: (b, 0, jax.lax.div(h, sizes.group), 0)),
        pl.BlockSpec((None, None, tile.queries), lambda i, h, b: (b, h, n - 1 - i)),
    )


def _by_key(sizes: _Sizes, tile: Tile, n_ranges: int) -> _Layout:
    """Returns the layout of kernels with one Triton program per key head and tile of keys.

    Each Triton program loops over the queries of all query heads that share the program's key head.
    """
    n, (T, _) = pl.cdiv(sizes.S, tile.keys), sizes.padded(tile)

    def row(b):
        return b if n_ranges > 1 else 0

    return _Layout(
        (n, sizes.K, sizes.B),
        pl.BlockSpec((None, None, 4), lambda j, h, b: (row(b), j, 0)),
        pl.BlockSpec((2,), lambda j, h, b: (0,)),
        pl.BlockSpec((None, T), lambda j, h, b: (b, 0)),
        pl.BlockSpec((None, tile.keys), lambda j, h, b: (b, j)),
        pl.BlockSpec((None, T, sizes.group, sizes.width), lambda j, h, b: (b, 0, h, 0)),
        pl.BlockSpec((None, tile.keys, None, sizes.width), lambda j, h, b: (b, j, h, 0)),
        pl.BlockSpec((None, sizes.group, T), lambda j, h, b: (b, h, 0)),
    )


def _ranges(
    sizes: _Sizes, tile: Tile, span: jax.Array, q_ids: jax.Array | None, k_ids: jax.Array | None, windowed: bool,
    loop_over: str = "keys",
) -> jax.Array:  # fmt: skip
    """Returns, for each of n tiles of queries, the range of key tiles that the queries attend to, [1 or B, n, 4] int32.

    A range of key tiles consists of four indices of key tiles, `begin <= whole <= rest <= end`. Key tiles before the
    index `begin` and from the index `end` on are fully masked, and the flash-attention kernels skip fully masked tiles.
    Key tiles `whole` to `rest - 1` contain no masked keys, and the flash-attention kernels do not apply the attention
    mask to these tiles. The flash-attention kernels apply the attention mask to the key tiles `begin` to `whole - 1`
    and `rest` to `end - 1`. With `loop_over="queries"`, `_ranges` returns the range of query tiles for each tile of
    keys.

    To find fully masked tiles, `_ranges` compares only the smallest and the largest document id of each tile. If
    document ids increase along a row, as in packed rows, the ranges of tiles are exact. If document ids do not increase
    along a row, the ranges of tiles may be longer than necessary, but the attention output is still correct.
    """
    q_first, k_first = (jnp.arange(0, n, step) for n, step in ((sizes.T, tile.queries), (sizes.S, tile.keys)))
    q_last = span[0] + jnp.minimum(q_first + tile.queries, sizes.T) - 1
    nearest = (span[0] + q_first)[:, None] - (k_first + tile.keys - 1)
    farthest = q_last[:, None] - k_first
    visible, whole = (farthest >= 0)[None], (nearest >= 0)[None]
    if windowed:
        visible, whole = visible & (nearest < span[1]), whole & (farthest < span[1])
    if q_ids is not None and k_ids is not None:
        (q_low, q_high), (k_low, k_high) = _extremes(q_ids, tile.queries), _extremes(k_ids, tile.keys)
        q_low, q_high = q_low[:, :, None], q_high[:, :, None]
        k_low, k_high = k_low[:, None], k_high[:, None]
        visible = visible & (q_low <= k_high) & (k_low <= q_high)
        whole = whole & (q_low == k_high) & (q_high == k_low)
    if loop_over == "queries":
        visible, whole = visible.swapaxes(1, 2), whole.swapaxes(1, 2)
    n = visible.shape[-1]
    index = jnp.arange(n)
    end = jnp.where(visible, index + 1, 0).max(-1)
    begin = jnp.minimum(jnp.where(visible, index, n).min(-1), end)
    first = jnp.minimum(jnp.where(whole, index, n).min(-1), end)
    rest = jnp.minimum(jnp.where(~whole & (index > first[..., None]), index, n).min(-1), end)
    return jnp.stack([begin, first, rest, end], -1).astype(jnp.int32)


def _extremes(ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the smallest and the largest document id of each of n tiles, [B, n] each."""
    tiles = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % size)), mode="edge").reshape(ids.shape[0], -1, size)
    return tiles.min(-1), tiles.max(-1)


# --- kernels ---


def _forward_kernel(ranges, span, q_ids, k_ids, q, k, v, out, lse, *, sizes, tile, static):
    first = (pl.num_programs(0) - 1 - pl.program_id(0)) * tile.queries
    rows, mask = first + jnp.arange(tile.queries), _Mask(span, static.windowed)
    in_row = _inside(rows, sizes.T)
    q_tile = _load(q, in_row, sizes.H)
    q_id = None if q_ids is None else _load(q_ids, in_row)[:, None]

    def step(_, j, carry, masked):
        acc, running_max, total = carry
        tile_slice = pl.ds(j * tile.keys, tile.keys)
        keys = j * tile.keys + jnp.arange(tile.keys)
        in_keys = _inside(keys, sizes.S)
        k_tile, v_tile = (_load(x.at[tile_slice, :], in_keys, sizes.H) for x in (k, v))
        scores = _dot(q_tile, k_tile, 1, 1, static) * _LOG2E
        if masked:
            k_id = None if k_ids is None else _load(k_ids.at[tile_slice], in_keys)[None, :]
            scores = jnp.where(mask(rows[:, None], keys[None, :], q_id, k_id), scores, _MASKED)
        new_max = jnp.maximum(running_max, scores.max(1))
        p, scale = jnp.exp2(scores - new_max[:, None]), jnp.exp2(running_max - new_max)
        acc = acc * scale[:, None] + _dot(p.astype(v_tile.dtype), v_tile, 1, 0, static)
        return acc, new_max, total * scale + p.sum(1)

    zeros = jnp.zeros((tile.queries, sizes.width), jnp.float32)
    lowest = jnp.full((tile.queries,), _MASKED, jnp.float32)
    acc, running_max, total = _loop(ranges, step, (zeros, lowest, jnp.zeros_like(lowest)))
    _store(out, acc / total[:, None], in_row, sizes.H)
    _store(lse, running_max + jnp.log2(total), in_row)


def _d_q_kernel(ranges, span, q_ids, k_ids, q, k, v, d_out, lse, delta, d_q, *, sizes, tile, static):
    first = (pl.num_programs(0) - 1 - pl.program_id(0)) * tile.queries
    rows, mask = first + jnp.arange(tile.queries), _Mask(span, static.windowed)
    in_row = _inside(rows, sizes.T)
    q_tile, d_out_tile = (_load(x, in_row, sizes.H) for x in (q, d_out))
    lse_tile, delta_tile = (_load(x, in_row)[:, None] for x in (lse, delta))
    q_id = None if q_ids is None else _load(q_ids, in_row)[:, None]

    def step(_, j, acc, masked):
        tile_slice = pl.ds(j * tile.keys, tile.keys)
        keys = j * tile.keys + jnp.arange(tile.keys)
        in_keys = _inside(keys, sizes.S)
        k_tile, v_tile = (_load(x.at[tile_slice, :], in_keys, sizes.H) for x in (k, v))
        p = jnp.exp2(_dot(q_tile, k_tile, 1, 1, static) * _LOG2E - lse_tile)
        if masked:
            k_id = None if k_ids is None else _load(k_ids.at[tile_slice], in_keys)[None, :]
            p = jnp.where(mask(rows[:, None], keys[None, :], q_id, k_id), p, 0.0)
        d_scores = p * (_dot(d_out_tile, v_tile, 1, 1, static) - delta_tile)
        return acc + _dot(d_scores.astype(k_tile.dtype), k_tile, 1, 0, static)

    acc = _loop(ranges, step, jnp.zeros((tile.queries, sizes.width), jnp.float32))
    _store(d_q, acc, in_row, sizes.H)


def _d_kv_kernel(ranges, span, q_ids, k_ids, q, k, v, d_out, lse, delta, d_k, d_v, *, sizes, tile, static):
    """Computes the gradients of k and v for one tile of keys.

    The kernel for the gradients of k and v computes the attention scores in the layout [keys, queries], so that no
    matrix product needs the transpose of the result of another matrix product.
    """
    keys = pl.program_id(0) * tile.keys + jnp.arange(tile.keys)
    mask, in_keys = _Mask(span, static.windowed), _inside(keys, sizes.S)
    k_tile, v_tile = (_load(x, in_keys, sizes.H) for x in (k, v))
    k_id = None if k_ids is None else _load(k_ids, in_keys)[:, None]

    def step(head, i, carry, masked):
        d_k_acc, d_v_acc = carry
        tile_slice = pl.ds(i * tile.queries, tile.queries)
        rows = i * tile.queries + jnp.arange(tile.queries)
        in_row = _inside(rows, sizes.T)
        q_tile, d_out_tile = (_load(x.at[tile_slice, head, :], in_row, sizes.H) for x in (q, d_out))
        lse_tile, delta_tile = (_load(x.at[head, tile_slice], in_row)[None, :] for x in (lse, delta))
        p = jnp.exp2(_dot(k_tile, q_tile, 1, 1, static) * _LOG2E - lse_tile)
        if masked:
            q_id = None if q_ids is None else _load(q_ids.at[tile_slice], in_row)[None, :]
            p = jnp.where(mask(rows[None, :], keys[:, None], q_id, k_id), p, 0.0)
        d_v_acc += _dot(p.astype(d_out_tile.dtype), d_out_tile, 1, 0, static)
        d_scores = p * (_dot(v_tile, d_out_tile, 1, 1, static) - delta_tile)
        return d_k_acc + _dot(d_scores.astype(q_tile.dtype), q_tile, 1, 0, static), d_v_acc

    zeros = jnp.zeros((tile.keys, sizes.width), jnp.float32)
    d_k_acc, d_v_acc = _loop(ranges, step, (zeros, zeros), repeats=sizes.group)
    _store(d_k, d_k_acc, in_keys, sizes.H)
    _store(d_v, d_v_acc, in_keys, sizes.H)


class _Mask:
    """Computes the attention mask of a tile from the positions and document ids of the queries and keys in the tile.

    The positions and document ids of the queries broadcast against the positions and document ids of the keys.
    """

    def __init__(self, span: Any, windowed: bool):
        self.offset, self.window = span[0], span[1] if windowed else None

    def __call__(self, row: jax.Array, key: jax.Array, q_id: jax.Array | None, k_id: jax.Array | None) -> jax.Array:
        distance = row + self.offset - key
        visible = distance >= 0
        if self.window is not None:
            visible = visible & (distance < self.window)
        return visible if q_id is None else visible & (q_id == k_id)


def _loop(ranges: Any, step: Callable, carry: Any, repeats: int = 1) -> Any:
    """Calls `step(repeat, tile, carry, masked)` for each `repeat` from 0 to `repeats - 1` and each tile in a range of
    tiles.

    `_loop` processes the tiles that need the mask (`masked` is True) before the tiles that do not need the mask.

    Args:
        ranges: range of tiles, given by the four indices (begin, whole, rest, end) that `_ranges` describes.
        step: function that processes one tile and returns the new carry.
    """
    begin, whole, rest, end = (ranges[i] for i in range(4))
    n_whole, n_before = rest - whole, whole - begin
    n_edge = n_before + end - rest

    def at_mask_edge(index, carry):
        repeat, i = _divide(index, n_edge, repeats)
        return step(repeat, begin + i + jnp.where(i < n_before, 0, n_whole), carry, True)

    def unmasked(index, carry):
        repeat, i = _divide(index, n_whole, repeats)
        return step(repeat, whole + i, carry, False)

    return jax.lax.fori_loop(
        0, repeats * n_whole, unmasked, jax.lax.fori_loop(0, repeats * n_edge, at_mask_edge, carry)
    )


def _divide(index: jax.Array, n: jax.Array, repeats: int) -> tuple[jax.Array, jax.Array]:
    return (jnp.int32(0), index) if repeats == 1 else (jax.lax.div(index, n), jax.lax.rem(index, n))


def _inside(positions: jax.Array, n: int) -> jax.Array | None:
    """Returns the mask of the positions of a tile that lie within a row of length n, or None if the tile size divides
    n."""
    return positions < n if n % positions.shape[0] else None


def _columns(width: int, H: int) -> jax.Array | None:
    """Returns the mask of the first H columns of a tile, or None if the tile has at most H columns."""
    return (jnp.arange(width) < H)[None, :] if width > H else None


def _both(rows: jax.Array | None, columns: jax.Array | None) -> jax.Array | None:
    rows = None if rows is None else rows[:, None]
    return columns if rows is None else rows if columns is None else rows & columns


def _load(ref: Any, rows: jax.Array | None, H: int | None = None) -> jax.Array:
    """Loads a tile [n] or [n, width], with zeros in place of elements after the end of the row or after the first H
    columns."""
    mask = rows if H is None else _both(rows, _columns(ref.shape[-1], H))
    return triton.load(ref) if mask is None else triton.load(ref, mask=mask, other=0)


def _store(ref: Any, x: jax.Array, rows: jax.Array | None, H: int | None = None) -> None:
    triton.store(ref, x.astype(ref.dtype), mask=rows if H is None else _both(rows, _columns(ref.shape[-1], H)))


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, static: _Static) -> jax.Array:
    """Computes the matrix product of a and b, contracted over `a_axis` and `b_axis`, with float32 accumulation."""
    return jax.lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), precision=static.precision, preferred_element_type=jnp.float32
    )
