"""Tests of the activation functions against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.from_scratch import feed_forward
from gptjax.ops.activation import gelu, relu_squared

X = np.concatenate([np.linspace(-12, 12, 961), [-1e4, 1e4]]).astype(np.float32)


def test_gelu_and_its_derivative_equal_the_tanh_formula():
    x, c = X.astype(np.float64), np.sqrt(2 / np.pi)
    tanh = np.tanh(c * (x + 0.044715 * x**3))
    slope = (1 + tanh) / 2 + x / 2 * (1 - tanh**2) * c * (1 + 3 * 0.044715 * x**2)
    value, pull = jax.vjp(gelu, jnp.array(X))
    np.testing.assert_allclose(value, x / 2 * (1 + tanh), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(pull(jnp.ones_like(X))[0], slope, rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(value[:-2], jax.nn.gelu(X[:-2], approximate=True), rtol=1e-5, atol=1e-5)


def test_gelu_keeps_bfloat16():
    low = jnp.asarray(X[:-2], jnp.bfloat16)
    assert gelu(low).dtype == jnp.bfloat16
    np.testing.assert_allclose(gelu(low).astype(np.float32), gelu(low.astype(jnp.float32)), rtol=2**-7, atol=1e-3)


def test_relu_squared():
    assert relu_squared(jnp.array([-2.0, 0.0, 3.0])).tolist() == [0, 0, 9]


def test_feed_forward():
    rng = np.random.default_rng(0)
    x, up, gate, down = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 4), (4, 6), (4, 6), (6, 4)))
    np.testing.assert_allclose(feed_forward(x, up, down), gelu(x @ up) @ down, rtol=1e-5, atol=1e-5)
    squared = np.maximum(x @ up, 0) ** 2 @ down
    np.testing.assert_allclose(feed_forward(x, up, down, activation=relu_squared), squared, rtol=1e-5, atol=1e-5)
    g = x @ gate
    gated = (g / (1 + np.exp(-g)) * (x @ up)) @ down
    np.testing.assert_allclose(feed_forward(x, up, down, gate), gated, rtol=1e-5, atol=1e-5)
