"""Tests of linear layers and their matrix products."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.ops.linear import linear, matmul

RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(2, 9, 16)).astype(np.float32), RNG.normal(size=(16, 12)).astype(np.float32)
BIAS = RNG.normal(size=12).astype(np.float32)


def test_float32():
    np.testing.assert_allclose(linear(X, W), X @ W, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(linear(X, W, BIAS), X @ W + BIAS, rtol=1e-5, atol=1e-5)


def test_bfloat16_value_and_gradients():
    """Master weights and results are float32; only the operands of the three products are rounded to bfloat16."""

    def run(dtype):
        def total(x, w, b):
            y = linear(x, w, b, dtype)
            return jnp.sin(y).sum(), y

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(X, W, BIAS)

    (_, y), grads = run("bfloat16")
    (_, exact), exact_grads = run("float32")
    for a, b in zip((y, *grads), (exact, *exact_grads), strict=True):
        assert a.dtype == jnp.float32
        assert np.linalg.norm(a - b) < 0.03 * np.linalg.norm(b)
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in (X, W)]
    np.testing.assert_allclose(y, rounded[0] @ rounded[1] + BIAS, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_number_of_leading_axes_under_jit_and_vmap(dtype):
    expected = matmul(jnp.array(W), X, dtype)
    np.testing.assert_allclose(jax.vmap(lambda x: matmul(jnp.array(W), x, dtype))(X), expected, atol=1e-5)
    np.testing.assert_allclose(matmul(jnp.array(W), X[0, 0], dtype), expected[0, 0], atol=1e-5)


def test_a_weight_of_another_type_registers_its_own_matmul():
    @dataclasses.dataclass
    class Twice:
        w: np.ndarray

    matmul.register(Twice, lambda w, x, dtype="float32": 2 * x @ w.w)
    np.testing.assert_allclose(linear(X, Twice(W), BIAS), 2 * X @ W + BIAS, rtol=1e-6)
