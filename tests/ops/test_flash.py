"""Our GPU attention kernels: run by Pallas' interpreter against XLA's attention, and lowered for CUDA."""

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
    """Ids that rise along a row, as packing gives them; or any, a document's tokens apart from each other."""
    ids = rng.integers(0, 5, (B, T))
    return {"none": None, "packed": np.sort(ids, axis=1), "scattered": ids}[kind]


def value_and_gradients(fn, args):
    def total(args):
        out = fn(*args)
        return jnp.sin(out.astype(jnp.float32)).sum(), out  # sin: a cotangent that differs everywhere

    (_, out), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(args)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def worst(T=100, B=2, N=4, K=2, H=64, kind="packed", window=0, dtype="float32", tiles=SMALL):
    """The largest differences from XLA's attention in float32: of the output, and of d_q, d_k, d_v."""
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
    assert worst(**case) < 1e-4


@pytest.mark.first_cases(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_flash_in_16_bits(dtype):
    """Products of 16-bit numbers, sums in float32: off by a few units in the last place of values near 4."""
    assert worst(T=48, B=1, dtype=dtype) < (0.06 if dtype == "bfloat16" else 0.008)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(24))
def test_flash_equals_xla_at_random(seed):
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
    assert worst(**case) < 1e-4, case


def test_seeds_side_by_side():
    """`vmap` over q, k and v, with documents that all have in common."""
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


# ---------------------------------------------------------------- which tiles are visited


@pytest.mark.parametrize("over", ["keys", "queries"])
@pytest.mark.parametrize(("kind", "window"), list(itertools.product(["none", "packed", "scattered"], [0, 1, 21, 64])))
def test_no_tile_is_missed_and_none_is_visited_for_nothing(kind, window, over):
    rng = np.random.default_rng(window)
    B, T, S, offset = 3, 75, 130, 40
    tile = Tile(16, 32)
    k_ids = documents(kind, B, S, rng)
    q_ids = None if k_ids is None else k_ids[:, offset : offset + T]
    sizes = flash._Sizes(B, T, S, 1, 1, 64)
    ranges = np.asarray(flash._ranges(sizes, tile, jnp.array([offset, window or S]), q_ids, k_ids, window > 0, over))
    distance = offset + np.arange(T)[:, None] - np.arange(S)
    sees = np.broadcast_to((distance >= 0) & (distance < (window or S)), (B, T, S))
    if k_ids is not None:
        sees = sees & (q_ids[:, :, None] == k_ids[:, None])
    tiles = np.zeros((B, 5, 5), int)  # how many pairs of each tile are seen, and how many there are
    pairs = np.zeros((5, 5), int)
    for i, j in itertools.product(range(5), range(5)):
        part = sees[:, 16 * i : 16 * i + 16, 32 * j : 32 * j + 32]
        tiles[:, i, j], pairs[i, j] = part.sum((1, 2)), part[0].shape[0] * 32  # a short tile of keys is never whole
    if over == "queries":
        tiles, pairs = tiles.swapaxes(1, 2), pairs.T
    for b, i in itertools.product(range(B), range(5)):
        begin, whole, rest, end = ranges[b if len(ranges) > 1 else 0, i]
        found = np.flatnonzero(tiles[b, i])
        assert begin <= whole <= rest <= end
        assert not len(found) or (begin <= found[0] and found[-1] < end)
        assert (tiles[b, i, whole:rest] == pairs[i, whole:rest]).all()
        if kind != "scattered":
            assert list(found) == list(range(begin, end))
            assert (tiles[b, i] == pairs[i]).sum() == rest - whole


def test_every_shape_has_tiles():
    """Powers of two of at least 16, and within the shared memory of a small Ampere GPU: q, k and v, and what is loaded
    ahead. The exact figure is Triton's."""
    for H, dtype in itertools.product((8, 64, 80, 128, 192, 256), ("bfloat16", "float16", "float32")):
        for tile in flash.default_tiles(H, dtype):
            assert {tile.queries, tile.keys} <= {16, 32, 64, 128} and tile.warps in (4, 8)
            row = max(64, 1 << (H - 1).bit_length()) * jnp.dtype(dtype).itemsize
            assert row * (tile.queries + tile.keys) <= 48 * 1024


# ---------------------------------------------------------------- lowered for CUDA


def kernels(fn, *args, mesh=None, capability=8.0):
    """How many Triton kernels there are in the program of `fn` for a GPU, and whether scores of T x T."""
    T = args[0].shape[1]
    here = mesh and jax.sharding.use_abstract_mesh(AbstractMesh(mesh, device.AXES, axis_types=(AxisType.Auto,) * 4))
    with here or contextlib.nullcontext(), device.compiling_for("gpu", capability=capability):
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
def test_documents_reach_the_kernel(T, mesh):
    found, square = kernels(gradient(), *shapes(T), mesh=mesh)
    assert found >= 3 and not square
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
        ({}, {"B": 1, "N": 70_000, "K": 70_000, "T": 128}),  # more heads than a grid's second axis has room for
    ],
)
def test_what_is_lowered(options, shape):
    assert kernels(gradient(**options), *shapes(**shape))[0] == 3


def test_layers_with_windows_of_their_own_reach_the_kernel():
    """The window is read from an array by the layer's number, in one loop over the layers."""
    cfg = gptjax.ModelConfig(
        arch="llama", n_layer=4, n_head=4, n_kv_head=2, d_model=256, vocab_size=256, context_length=1024,
        sliding_window=128, window_pattern="SSL", dtype="bfloat16",
    )  # fmt: skip
    ids, loss = jax.ShapeDtypeStruct((2, 1000), jnp.int32), next_token(cfg)

    def total(params, ids):
        return loss(params, Batch(ids, ids, None, ids), None)[0].total

    found, square = kernels(lambda ids, params: jax.grad(total)(params, ids), ids, gptjax.abstract_params(cfg))
    assert found >= 3 and not square


def test_seeds_side_by_side_are_lowered():
    q, k, v, ids = shapes(T=1000)
    q, k, v = (jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in (q, k, v))
    assert kernels(jax.vmap(gradient(), (0, 0, 0, None)), q, k, v, ids)[0] == 3
