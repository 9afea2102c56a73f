"""Tests of LayerNorm and RMSNorm against numpy."""

import jax.numpy as jnp
import numpy as np

from gptjax.ops.norm import layer_norm, rms_norm

RNG = np.random.default_rng(0)
X = (3 * RNG.normal(size=(2, 4, 16)) + 5).astype(np.float32)
SCALE, BIAS = RNG.normal(size=(2, 16)).astype(np.float32)


def test_layer_norm():
    x = X.astype(np.float64)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer_norm(X), expected, atol=1e-5)
    np.testing.assert_allclose(layer_norm(X, SCALE, BIAS), expected * SCALE + BIAS, atol=1e-5)


def test_layer_norm_of_large_values():
    """The mean is subtracted first: E[x^2] - E[x]^2 would lose the variance to rounding."""
    np.testing.assert_allclose(layer_norm(X + 1e4), layer_norm(X), atol=2e-3)


def test_rms_norm():
    x = X.astype(np.float64)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(rms_norm(X, eps=1e-6), expected, atol=1e-5)
    np.testing.assert_allclose(rms_norm(X, SCALE, eps=1e-6), expected * SCALE, atol=1e-5)


def test_bfloat16_is_normalised_in_float32():
    low = jnp.asarray(X, jnp.bfloat16)
    for norm in (layer_norm, rms_norm):
        assert norm(low).dtype == jnp.bfloat16
        np.testing.assert_allclose(norm(low).astype(np.float32), norm(low.astype(jnp.float32)), atol=0.01)


def test_zeros_stay_finite():
    assert not np.any(layer_norm(jnp.zeros((1, 4)))) and not np.any(rms_norm(jnp.zeros((1, 4))))
