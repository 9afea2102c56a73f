"""The kernels of other devices against the attention that XLA runs here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
        return jnp.sin(out).sum(), out  # sin: a cotangent that differs everywhere

    (_, out), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(args)
    return out, *gradients


def scaled(kernel, **options):
    return lambda q, k, v: kernel(q * q.shape[-1] ** -0.5, k, v, **options)


CASES = {
    "grouped heads": ({}, {}),
    "documents": ({"segment_ids": SEGMENTS}, {"K": 4}),
    "a window": ({"window": 70}, {"K": 1}),
    "a window within documents": ({"window": 100, "segment_ids": SEGMENTS}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_splash_equals_xla(case):
    options, shape = CASES[case]
    args = qkv(**shape)
    ours = value_and_gradients(scaled(fused.splash, interpret=True, **options), args)
    expected = value_and_gradients(lambda q, k, v: heads_attention(q, k, v, **options), args)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [0, 70])
def test_what_cudnn_is_asked_for_equals_xla(window):
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
        ({"window": np.int32(32)}, "xla"),  # as of layers that differ, in a loop
        ({"offset": np.array([0, 0])}, "xla"),
        ({"dropout": 0.1, "dropout_key": jax.random.key(0)}, "xla"),
    ],
)
def test_who_attends_on_a_tpu(options, expected, monkeypatch):
    monkeypatch.setattr(fused, "splash", lambda q, *_, **__: jnp.full_like(q, 7))
    with device.compiling_for("tpu"):
        out = heads_attention(*map(jnp.asarray, qkv()), **options)
        odd = heads_attention(*map(jnp.asarray, qkv(T=130)))
    assert bool((out == 7).all()) == (expected == "splash")
    assert not (odd == 7).all()


def test_a_mesh_that_divides_tokens_leaves_them_to_xla():
    devices = np.asarray(jax.devices()[:1])
    with jax.set_mesh(mesh_of((1, 1, 1, 1), devices)):
        assert fused.splash_fits(256)
        assert not fused.splash_fits(200)
        ours = value_and_gradients(scaled(fused.splash, interpret=True), qkv())
    expected = value_and_gradients(heads_attention, qkv())
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
