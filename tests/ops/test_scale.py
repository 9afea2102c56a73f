"""Tests of `scaled`: activations times a learned factor, whose gradient is a sum over all tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.ops.linear import linear
from gptjax.ops.scale import scaled

TOKENS = 2**15


@pytest.mark.parametrize("shape", [(), (8,)])
def test_scaled_equals_the_product(shape):
    rng = np.random.default_rng(0)
    x, factor, g = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 8), shape, (2, 3, 8)))
    ours, expected = (jax.vjp(fn, x, factor) for fn in (scaled, lambda x, factor: x * factor))
    np.testing.assert_array_equal(ours[0], expected[0])
    for a, b in zip(ours[1](g), expected[1](g), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    "fn", [scaled, lambda x, bias: linear(x, jnp.eye(8), bias, "bfloat16")], ids=["a factor", "a bias"]
)
def test_the_gradient_is_summed_in_float32(fn):
    """A bfloat16 sum of ones stops at 256, or at a few hundred if XLA adds partial sums."""
    x = jnp.ones((TOKENS, 8), jnp.bfloat16)
    gradient = jax.grad(lambda factor: fn(x, factor).astype(jnp.float32).sum())(jnp.ones(8))
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, TOKENS)
