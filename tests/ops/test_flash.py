"""Tests of our flash attention kernels: run in Pallas' interpreter and compared with XLA, and lowered for CUDA."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

import gptjax
from gptjax.losses import next_token
from gptjax.ops import device, flash, fused
from gptjax.ops.attention import heads_attention
from gptjax.ops.flash import Tile, Tiles
from gptjax.types import Batch

SMALL = Tiles(Tile(32, 16), Tile(16, 32), Tile(32, 32))


def documents(kind, B, T, rng):
    """Segment ids: "packed" ids increase along a row; "scattered" ids are random, so documents are interleaved."""
    ids = rng.integers(0, 5, (B, T))
    return {"none": None, "packed": np.sort(ids, axis=1), "scattered": ids}[kind]


def value_and_gradients(fn, args):
    def total(args):
        out = fn(*args)
        return jnp.sin(out.astype(jnp.float32)).sum(), out  # sin: every element has a different cotangent

    (_, out), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(args)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def max_error(T=100, B=2, N=4, K=2, H=64, kind="packed", window=0, dtype="float32", tiles=SMALL):
    """Largest difference from XLA's float32 attention, in the output and the gradients of q, k and v."""
    rng = np.random.default_rng(T + H)
    q, k, v = (jnp.asarray(rng.normal(size=size), dtype) for size in ((B, T, N, H), (B, K, T, H), (B, K, T, H)))
    ids = documents(kind, B, T, rng)

    def ours(q, k, v):
        q = q * q.shape[-1] ** -0.5
        return fused.flash(q, k, v, segment_ids=ids, window=window, tiles=tiles, interpret=True)

    def expected(q, k, v):
        return heads_attention(q, k, v, segment_ids=ids, window=window)

    wide = tuple(x.astype(jnp.float32) for x in (q, k, v))
    pairs = zip(value_and_gradients(ours, (q, k, v)), value_and_gradients(expected, wide), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


@pytest.mark.first_cases(1)
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"kind": "scattered", "H": 80, "window": 20, "K": 1},
        {"kind": "none", "T": 128, "window": np.int32(50), "K": 4},
        {"kind": "packed", "T": 40, "N": 2, "K": 1, "H": 256, "B": 1},
    ],
    ids=lambda case: " ".join(f"{key}={value}" for key, value in case.items()) or "a row of 100",
)
def test_flash_equals_xla(case):
    assert max_error(**case) < 1e-4


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_flash_in_16_bits(dtype):
    """16-bit operands, float32 sums: the error is a few units in the last place of values near 4."""
    assert max_error(T=48, B=1, dtype=dtype) < (0.06 if dtype == "bfloat16" else 0.008)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(24))
def test_flash_equals_xla_with_random_options(seed):
    rng = np.random.default_rng(seed)
    N = 4
    case = dict(
        T=int(rng.choice([100, 128, 200, 257])), N=N, K=N // int(rng.choice([1, 2, 4])),
        H=int(rng.choice([64, 80, 128, 256, 8])), kind=str(rng.choice(["none", "packed", "scattered"])),
        window=int(rng.choice([0, 1, 30, 64, 500])),
        tiles=Tiles(*(Tile(*map(int, rng.choice([16, 32, 64], 2))) for _ in range(3))),
    )  # fmt: skip
    if rng.random() < 0.3:
        case["window"] = np.int32(case["window"])
    assert max_error(**case) < 1e-4, case


def test_flash_under_vmap():
    """`vmap` over q, k and v, as for several seeds; the segment ids are shared."""
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=(2, *size)).astype(np.float32) for size in ((1, 40, 2, 16), (1, 2, 40, 16), (1, 2, 40, 16))
    )
    options = {"segment_ids": documents("packed", 1, 40, rng), "window": 30}

    def ours(q, k, v):
        return fused.flash(q * 0.25, k, v, tiles=SMALL, interpret=True, **options)

    def expected(q, k, v):
        return heads_attention(q, k, v, **options)

    both = (value_and_gradients(jax.vmap(fn), (q, k, v)) for fn in (ours, expected))
    for a, b in zip(*both, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- ranges of tiles


@pytest.mark.parametrize("loop_over", ["keys", "queries"])
@pytest.mark.parametrize(("kind", "window"), list(itertools.product(["none", "packed", "scattered"], [0, 1, 21, 64])))
def test_ranges_contain_exactly_the_tiles_that_are_not_fully_masked(kind, window, loop_over):
    rng = np.random.default_rng(window)
    B, T, S, offset = 3, 75, 130, 40
    tile = Tile(16, 32)
    k_ids = documents(kind, B, S, rng)
    q_ids = None if k_ids is None else k_ids[:, offset : offset + T]
    sizes = flash._Sizes(B, T, S, 1, 1, 64)
    span = jnp.array([offset, window or S])
    ranges = np.asarray(flash._ranges(sizes, tile, span, q_ids, k_ids, window > 0, loop_over))
    distance = offset + np.arange(T)[:, None] - np.arange(S)
    mask = np.broadcast_to((distance >= 0) & (distance < (window or S)), (B, T, S))
    if k_ids is not None:
        mask = mask & (q_ids[:, :, None] == k_ids[:, None])
    tiles = np.zeros((B, 5, 5), int)  # number of unmasked (query, key) pairs per tile; `pairs`: number of all pairs
    pairs = np.zeros((5, 5), int)
    for i, j in itertools.product(range(5), range(5)):
        tile_mask = mask[:, 16 * i : 16 * i + 16, 32 * j : 32 * j + 32]
        tiles[:, i, j], pairs[i, j] = (
            tile_mask.sum((1, 2)),
            tile_mask[0].shape[0] * 32,
        )  # a partial tile of keys is never whole
    if loop_over == "queries":
        tiles, pairs = tiles.swapaxes(1, 2), pairs.T
    for b, i in itertools.product(range(B), range(5)):
        begin, whole, rest, end = ranges[b if len(ranges) > 1 else 0, i]
        nonempty = np.flatnonzero(tiles[b, i])
        assert begin <= whole <= rest <= end
        assert not len(nonempty) or (begin <= nonempty[0] and nonempty[-1] < end)
        assert (tiles[b, i, whole:rest] == pairs[i, whole:rest]).all()
        if kind != "scattered":
            assert list(nonempty) == list(range(begin, end))
            assert (tiles[b, i] == pairs[i]).sum() == rest - whole


def test_every_shape_has_tiles():
    """Tile sizes are powers of two from 16 to 128, and tiles of queries and keys together take at most 48 KiB.

    A small Ampere GPU has 99 KiB of shared memory. How much a kernel needs exactly depends on Triton.
    """
    for H, dtype in itertools.product((8, 64, 80, 128, 192, 256), ("bfloat16", "float16", "float32")):
        for tile in flash.default_tiles(H, dtype):
            assert {tile.queries, tile.keys} <= {16, 32, 64, 128} and tile.warps in (4, 8)
            row = max(64, 1 << (H - 1).bit_length()) * jnp.dtype(dtype).itemsize
            assert row * (tile.queries + tile.keys) <= 48 * 1024


# ---------------------------------------------------------------- lowered for CUDA


def kernels(fn, *args, mesh=None, capability=8.0):
    """(number of Triton kernels in the program of `fn` for a GPU, whether it contains T x T scores)."""
    T = args[0].shape[1]
    mesh_context = mesh and jax.sharding.use_abstract_mesh(
        AbstractMesh(mesh, device.AXES, axis_types=(AxisType.Auto,) * 4)
    )
    with mesh_context or contextlib.nullcontext(), device.compiling_for("gpu", capability=capability):
        text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("__gpu$xla.gpu.triton"), f"x{T}x{T}x" in text


def gradient(ids=True, **options):
    def total(q, k, v, segment_ids):
        return heads_attention(q, k, v, segment_ids=segment_ids if ids else None, **options).astype(jnp.float32).sum()

    return jax.grad(total, (0, 1, 2))


def shapes(T=1024, N=4, K=2, H=64, B=8, dtype="bfloat16"):
    q, kv = jax.ShapeDtypeStruct((B, T, N, H), dtype), jax.ShapeDtypeStruct((B, K, T, H), dtype)
    return q, kv, kv, jax.ShapeDtypeStruct((B, T), jnp.int32)


@pytest.mark.first_cases(4)
@pytest.mark.parametrize("T", [1024, 1000])
@pytest.mark.parametrize("mesh", [None, (8, 1, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2)])
def test_document_masks_use_the_kernel(T, mesh):
    n_kernels, has_scores = kernels(gradient(), *shapes(T), mesh=mesh)
    assert n_kernels >= 3 and not has_scores
    if mesh is None:
        assert kernels(gradient(), *shapes(T), capability=7.5) == (0, True)


@pytest.mark.first_cases(4)
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"window": 128}, {}),
        ({"window": 128, "ids": False}, {"T": 1000, "dtype": "float32"}),
        ({}, {"H": 80}),
        ({}, {"H": 256, "dtype": "float32"}),
        ({}, {"H": 256, "K": 1}),
        ({}, {"H": 128, "dtype": "float16"}),
        ({}, {"T": 1, "B": 1}),
        ({}, {"B": 1, "N": 70_000, "K": 70_000, "T": 128}),  # more heads than the second axis of a CUDA grid allows
    ],
)
def test_kernels_are_lowered(options, shape):
    assert kernels(gradient(**options), *shapes(**shape))[0] == 3


def test_different_windows_per_layer_use_the_kernel():
    """In the scan over the layers the window is a traced value, read from an array by the layer's index."""
    cfg = gptjax.ModelConfig(
        arch="llama", n_layer=4, n_head=4, n_kv_head=2, d_model=256, vocab_size=256, context_length=1024,
        sliding_window=128, window_pattern="SSL", dtype="bfloat16",
    )  # fmt: skip
    ids, loss = jax.ShapeDtypeStruct((2, 1000), jnp.int32), next_token(cfg)

    def total(params, ids):
        return loss(params, Batch(ids, ids, None, ids), None)[0].total

    n_kernels, has_scores = kernels(lambda ids, params: jax.grad(total)(params, ids), ids, gptjax.abstract_params(cfg))
    assert n_kernels >= 3 and not has_scores


def test_vmapped_kernels_are_lowered():
    q, k, v, ids = shapes(T=1000)
    q, k, v = (jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in (q, k, v))
    assert kernels(jax.vmap(gradient(), (0, 0, 0, None)), q, k, v, ids)[0] == 3
