"""Tests of int8 and NF4 weight quantisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import UserError
from gptjax.config import ModelConfig
from gptjax.ops.linear import dense, matmul, matmul_transposed, take
from gptjax.ops.quant import LEVELS, NF4, Int8, dequantize, int8, nf4, quantize

CFG = ModelConfig(vocab_size=61, context_length=32, n_layer=2, d_model=64, n_head=4, tie_embeddings=False)
SPECS = ("int8", "nf4", (("wte/* | */kernel", "int8"),), (("blocks/attn/*/kernel", "nf4"), ("lm_head/*", "int8")))


@pytest.fixture(scope="module")
def params():
    return gptjax.init_params(jax.random.key(0), CFG)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("make", [int8, nf4])
def test_the_error_is_that_of_the_docstring(make):
    w = normal(1024, 256)
    error = jnp.sqrt(jnp.square(dense(make(w)) - w).mean())
    assert float(error) == pytest.approx({int8: 0.0075, nf4: 0.09}[make], rel=0.1)


def size_bytes(leaf):
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(leaf))


@pytest.mark.parametrize("make, bits", [(int8, 8 + 32 / 1024), (nf4, 4 + 8 / 64 + 32 / (64 * 256) + 32 / 1024 / 256)])
def test_size(make, bits):
    assert 8 * size_bytes(make(normal(1024, 256))) == bits * 1024 * 256


def test_int8_rounds_to_the_nearest_multiple():
    w = np.array([[1.0, -3.0], [0.5, 127.0], [-1.27, 0.0]], np.float32)
    leaf = int8(w)
    np.testing.assert_allclose(leaf.scale, [[0.01, 1.0]])
    np.testing.assert_array_equal(leaf.values, [[100, -3], [50, 127], [-127, 0]])
    np.testing.assert_array_equal(int8(w.T, axis=-1).values, leaf.values.T)


def test_nf4_rounds_to_the_nearest_level():
    """Compares with numpy block by block, using the absmaxes of the leaf, because these are rounded as well."""
    w = np.asarray(normal(128, 8))
    leaf = nf4(w)
    absmax = np.abs(w.reshape(2, 64, 8)).max(1)
    rounded_absmax = leaf.absmax * np.asarray(leaf.scale) + leaf.offset
    np.testing.assert_allclose(rounded_absmax, absmax, atol=float(leaf.scale.max()) / 2 * 1.01)
    scaled = w.reshape(2, 64, 8) / absmax[:, None]
    nearest = np.abs(scaled[..., None] - np.array(LEVELS, np.float32)).argmin(-1)
    np.testing.assert_allclose(
        dense(leaf), (np.array(LEVELS, np.float32)[nearest] * rounded_absmax[:, None]).reshape(128, 8), atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("make", [int8, nf4])
def test_zeros_stay_zero_and_a_stack_equals_its_matrices(make):
    w = normal(3, 64, 32).at[1].set(0)
    stacked = dense(make(w))
    np.testing.assert_array_equal(stacked[1], 0)
    for i in range(3):
        np.testing.assert_allclose(stacked[i], dense(make(w[i])), rtol=1e-6)


@pytest.mark.first_cases(6)
@pytest.mark.parametrize("rows", [(1,), (2, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("leaf", [int8(normal(64, 48)), int8(normal(64, 48), axis=-1), nf4(normal(64, 48))])
def test_products_equal_those_of_the_dense_matrix(leaf, dtype, rows):
    for product, width in ((matmul, 64), (matmul_transposed, 48)):
        x = normal(*rows, width, seed=1)

        def value(fn, w, x, product=product):
            return fn(product(w, x, dtype))

        tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == "float32" else dict(rtol=0.03, atol=0.3)
        np.testing.assert_allclose(product(leaf, x, dtype), product(dense(leaf), x, dtype), **tolerance)
        got, want = (jax.grad(lambda x, w=w: value(lambda y: jnp.sin(y).sum(), w, x))(x) for w in (leaf, dense(leaf)))
        if dtype == "float32":
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-3)


def test_take_dequantises_the_rows():
    leaf = int8(normal(10, 16), axis=-1)
    np.testing.assert_array_equal(take(leaf, jnp.array([[3, 99]])), dense(leaf)[jnp.array([[3, 9]])])


@pytest.mark.slow
@pytest.mark.first_cases(3)
@pytest.mark.parametrize("spec", [*(pytest.param(spec, marks=pytest.mark.slow) for spec in SPECS[:2]), *SPECS[2:]])
def test_a_quantised_model_equals_the_model_with_dequantised_weights(params, spec):
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, CFG.vocab_size)
    small, plain = quantize(params, spec), dequantize(quantize(params, spec))
    np.testing.assert_allclose(
        jax.jit(gptjax.forward, static_argnums=2)(small, tokens, CFG), gptjax.forward(plain, tokens, CFG), atol=2e-5
    )
    prompts = [[1, 2, 3], [4]]
    both = [gptjax.generate(p, prompts, CFG, max_new_tokens=8, key=jax.random.key(0)) for p in (small, plain)]
    assert both[0] == both[1]


def test_a_one_word_spec_quantises_the_kernels_only(params):
    small = quantize(params, "nf4")
    assert isinstance(small["blocks"]["mlp"]["up"]["kernel"], NF4)
    assert isinstance(small["lm_head"]["kernel"], NF4)
    assert small["wte"]["embedding"] is params["wte"]["embedding"]
    assert isinstance(quantize(params)["wte"]["embedding"], Int8)
    assert quantize(params)["wpe"]["embedding"] is params["wpe"]["embedding"]
    assert quantize(params, "none") == params
    assert jax.tree.structure(dequantize(small)) == jax.tree.structure(params)


@pytest.mark.slow
def test_gradients_reach_other_leaves_through_quantized_ones(params):
    tokens = jnp.arange(16)[None]
    small = quantize(params, "nf4")

    def loss(table, rest):
        return jnp.square(gptjax.forward({**rest, "wpe": {"embedding": table}}, tokens, CFG)).mean()

    table = params["wpe"]["embedding"]
    np.testing.assert_allclose(
        jax.grad(loss)(table, small), jax.grad(loss)(table, dequantize(small)), rtol=1e-3, atol=1e-5
    )


def test_errors(params):
    with pytest.raises(UserError, match=r"(?s)'wte/x' matches no parameter.*expected int8, nf4, none; got 'int4'"):
        quantize(params, (("wte/x", "int8"), ("*", "int4")))
    with pytest.raises(UserError, match="ln_f/scale cannot be int8"):
        quantize(params, (("*", "int8"),))
    with pytest.raises(UserError, match="wte/embedding cannot be nf4"):
        quantize(params, (("wte/*", "nf4"),))
    with pytest.raises(UserError, match="not a plain array"):
        quantize(quantize(params))
    with pytest.raises(UserError, match="expected int8, nf4, none, or pairs"):
        quantize(params, "int4")
    odd = {"kernel": jnp.ones((51, 8))}
    with pytest.raises(UserError, match="no even divisor"):
        quantize(odd, (("kernel", "nf4"),))
