"""Tests of the fused attention kernels: compared with XLA, and which one is chosen for which device."""

import contextlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from gptjax.ops import device, fused
from gptjax.ops.attention import heads_attention
from gptjax.parallel.mesh import mesh_of

SEGMENTS = np.sort(np.random.default_rng(0).integers(0, 4, (2, 256)), axis=1)


def qkv(T=256, N=4, K=2, H=64, B=2):
    rng = np.random.default_rng(T)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in ((B, T, N, H), (B, K, T, H), (B, K, T, H)))


def value_and_gradients(fn, args):
    def total(args):
        out = fn(*args)
        return jnp.sin(out).sum(), out  # sin: every element has a different cotangent

    (_, out), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(args)
    return out, *gradients


def scaled(kernel, **options):
    return lambda q, k, v: kernel(q * q.shape[-1] ** -0.5, k, v, **options)


CASES = {
    "grouped-query attention": ({}, {}),
    "documents": ({"segment_ids": SEGMENTS}, {"K": 4}),
    "sliding window": ({"window": 70}, {"K": 1}),
    "sliding window and documents": ({"window": 100, "segment_ids": SEGMENTS}, {}),
}


@pytest.mark.slow
@pytest.mark.first_cases(2)
@pytest.mark.parametrize("case", CASES)
def test_splash_equals_xla(case):
    options, shape = CASES[case]
    args = qkv(**shape)
    ours = value_and_gradients(scaled(fused.splash, interpret=True, **options), args)
    expected = value_and_gradients(lambda q, k, v: heads_attention(q, k, v, **options), args)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [0, 70])
def test_the_arguments_for_cudnn_give_the_result_of_xla(window):
    args = qkv()
    ours = value_and_gradients(scaled(lambda q, k, v: fused.cudnn(q, k, v, window=window, by="xla")), args)
    expected = value_and_gradients(lambda q, k, v: heads_attention(q, k, v, window=window), args)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "splash"),
        ({"segment_ids": SEGMENTS}, "splash"),
        ({"window": 32}, "splash"),
        ({"alibi": True}, "xla"),
        ({"window": np.int32(32)}, "xla"),  # traced, as in a scan over layers with different windows
        ({"offset": np.array([0, 0])}, "xla"),
        ({"dropout": 0.1, "dropout_key": jax.random.key(0)}, "xla"),
    ],
)
def test_which_kernel_is_used_on_a_tpu(options, expected, monkeypatch):
    monkeypatch.setattr(fused, "splash", lambda q, *_, **__: jnp.full_like(q, 7))
    with device.compiling_for("tpu"):
        out = heads_attention(*map(jnp.asarray, qkv()), **options)
        odd = heads_attention(*map(jnp.asarray, qkv(T=130)))
    assert bool((out == 7).all()) == (expected == "splash")
    assert not (odd == 7).all()


def abstract_mesh(*shape):
    """Context with an abstract mesh of this shape, without devices."""
    return jax.sharding.use_abstract_mesh(AbstractMesh(shape, device.AXES, axis_types=(AxisType.Auto,) * 4))


NO_CUDNN = {"cudnn": 0}
FLOAT32 = {"dtype": "float32"}
CONTEXT_PARALLEL = {"mesh": (1, 2, 1, 4)}


@pytest.mark.parametrize(
    ("capability", "options", "shape", "expected"),
    [
        (8.0, {}, {}, "cudnn"),
        (8.0, {}, {"T": 1000}, "cudnn"),
        (8.0, {"window": 32}, {}, "cudnn"),
        (8.0, {}, {"dtype": "float16"}, "cudnn"),
        (8.0, {}, {"mesh": (2, 2, 2, 1)}, "cudnn"),
        (8.0, {}, CONTEXT_PARALLEL, "flash"),
        (8.0, {}, NO_CUDNN, "flash"),
        (8.0, {}, FLOAT32, "flash"),
        (8.0, {}, {"H": 256}, "flash"),
        (9.0, {}, {"H": 256}, "flash"),  # cuDNN would need a local Hopper GPU: jax checks it
        (8.0, {}, {"H": 288}, None),
        (8.0, {}, {"H": 60}, None),
        (8.0, {"segment_ids": SEGMENTS}, {}, "flash"),
        (12.0, {"segment_ids": SEGMENTS}, {"T": 1000}, "flash"),
        (8.0, {"segment_ids": SEGMENTS, "window": 32}, {"mesh": (2, 2, 2, 1)}, "flash"),
        (8.0, {"window": np.int32(32)}, {}, "flash"),  # traced, as in a scan over layers with different windows
        (7.5, {}, {}, None),
        (7.0, {"segment_ids": SEGMENTS}, {}, None),
        (0.0, {}, {}, None),
    ],
)
def test_which_kernel_is_used_on_a_gpu(capability, options, shape, expected, monkeypatch):
    setting = {"T": 1024, "H": 64, "dtype": "bfloat16", "cudnn": 91100, "mesh": None, **shape}
    monkeypatch.setattr(fused, "cudnn_version", lambda: setting["cudnn"])
    q = jax.ShapeDtypeStruct((8, setting["T"], 4, setting["H"]), setting["dtype"])
    mesh_context = abstract_mesh(*setting["mesh"]) if setting["mesh"] else contextlib.nullcontext()
    with mesh_context, device.compiling_for("gpu", capability=capability):
        kernel = fused.kernel_for(q, **options)
    assert (kernel and kernel.__name__) == expected


def test_cudnn_supports_heads_of_256_channels_on_hopper(monkeypatch):
    monkeypatch.setattr(fused, "cudnn_version", lambda: 90500)
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    q = jax.ShapeDtypeStruct((8, 1024, 4, 256), "bfloat16")
    for capability, expected in ((8.9, "flash"), (9.0, "cudnn"), (10.0, "flash")):
        with device.compiling_for("gpu", capability=capability):
            assert fused.kernel_for(q).__name__ == expected


def test_what_uses_xla_on_a_gpu(monkeypatch):
    """ALiBi biases, dropout, and queries at an offset from their keys use XLA, not a kernel."""
    monkeypatch.setattr(fused, "flash", lambda q, *_, **__: jnp.full_like(q, 7))
    q, k, v = map(jnp.asarray, qkv())
    with device.compiling_for("gpu"):
        assert (heads_attention(q, k, v, segment_ids=SEGMENTS) == 7).all()
        for options in (
            {"alibi": True},
            {"offset": np.array([0, 0])},
            {"dropout": 0.1, "dropout_key": jax.random.key(0)},
        ):
            assert not (heads_attention(q, k, v, **options) == 7).all()
        assert not (heads_attention(q[:, -1:], k, v, offset=255) == 7).all()


def test_capability():
    assert device.capability() == 0
    with device.compiling_for("gpu"):
        assert device.capability() == 8.0
    with device.compiling_for("tpu"):
        assert device.capability() == 0


@pytest.mark.parametrize(("kind", "expected"), [("9.0", 9.0), ("12.1", 12.1), ("gfx90a", 0.0), (None, 0.0)])
def test_capability_of_the_local_gpu(kind, expected, monkeypatch):
    gpu = SimpleNamespace(**{} if kind is None else {"compute_capability": kind})
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert device.capability() == expected


@pytest.mark.parametrize("mesh", [None, (2, 2, 2, 1)])
def test_cudnn_is_lowered_for_cuda(mesh, monkeypatch):
    """jax's checks of the cuDNN version and the compute capability are mocked.

    Under a mesh the kernel is lowered with the shapes of one device, so that no later pass needs to partition it.
    """
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(library, "check_compute_capability", lambda wanted: float(wanted) <= 8.0)
    monkeypatch.setattr(library, "is_cuda_compute_capability_equal", lambda wanted: False)
    monkeypatch.setattr(fused, "cudnn_version", lambda: 91100)
    q, kv = (jax.ShapeDtypeStruct(size, "bfloat16") for size in ((8, 1000, 4, 64), (8, 2, 1000, 64)))
    mesh_context = abstract_mesh(*mesh) if mesh else contextlib.nullcontext()
    with mesh_context, device.compiling_for("gpu"):
        total = lambda q, k, v: heads_attention(q, k, v, window=128).astype(jnp.float32).sum()  # noqa: E731
        traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(q, kv, kv)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text and "CustomSPMDPartitioning" not in text
    assert ("tensor<2x1000x2x64xbf16>" in text) == (mesh is not None)  # 8 rows over 4 devices, 4 heads over 2


def test_cudnn_refuses_documents_and_context_parallelism():
    with pytest.raises(ValueError, match="use flash"):
        fused.cudnn(*qkv(), segment_ids=SEGMENTS)
    with abstract_mesh(1, 1, 1, 8), pytest.raises(ValueError, match="use flash"):
        fused.cudnn(*qkv())


def test_splash_under_a_mesh_of_one_device():
    devices = np.asarray(jax.devices()[:1])
    with jax.set_mesh(mesh_of((1, 1, 1, 1), devices)):
        assert fused.splash_fits(256)
        assert not fused.splash_fits(200)
        ours = value_and_gradients(scaled(fused.splash, interpret=True), qkv())
    expected = value_and_gradients(heads_attention, qkv())
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_with_context_parallelism_each_device_needs_a_multiple_of_128_tokens():
    with abstract_mesh(1, 1, 2, 4):
        assert fused.splash_fits(512) and fused.splash_fits(2560)
        assert not fused.splash_fits(256) and not fused.splash_fits(768)
