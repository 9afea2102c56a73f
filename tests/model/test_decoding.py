"""`for_decoding`, the parameter layout for single tokens: the same logits, on a CPU and in the programs of a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import lora, quantize, tree
from gptjax.config import LoraConfig
from gptjax.generation import for_decoding, generate
from gptjax.model.cache import init_cache
from gptjax.model.gpt import extend, forward
from gptjax.ops.device import compiling_for
from gptjax.ops.linear import dense, matmul, side_by_side, transposed
from gptjax.ops.quant import int8, nf4

TOKENS = np.random.default_rng(0).integers(0, 17, (1, 9))
SWITCHES = {
    "gpt2": {"arch": "gpt2"},
    "llama": {"arch": "llama"},
    "biases": {"arch": "llama", "qkv_bias": True, "tie_embeddings": False},
    "modern": {"arch": "modern"},
}
KINDS = {
    "plain": lambda params: params,
    "int8": lambda params: quantize(params, "int8"),
    "nf4": lambda params: quantize(params, "nf4"),
    "only q": lambda params: quantize(params, (("blocks/attn/q/kernel", "int8"), ("*", "none"))),
    "lora": lambda params: lora.attach(
        params, lora.init(jax.random.key(0), params, LoraConfig(rank=2)), LoraConfig(rank=2)
    ),
}


def in_steps(params, cfg, tokens=TOKENS):
    """Logits of all tokens through the cache: the first three in one call, then one token per call."""
    logits, cache = extend(params, tokens[:, :3], cfg, init_cache(cfg, 1, 12))
    step = jax.jit(lambda params, token, cache: extend(params, token, cfg, cache))
    for i in range(3, tokens.shape[1]):
        more, cache = step(params, tokens[:, i : i + 1], cache)
        logits = jnp.concatenate([logits, more], 1)
    return logits


@pytest.mark.first_cases(1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SWITCHES)
def test_it_reads_as_before(tiny, name, kind):
    cfg, params = tiny(**SWITCHES[name], d_ff=64)
    params = KINDS[kind](params)
    want = forward(params, TOKENS, cfg)
    with compiling_for("gpu", capability=7.5):  # a GPU without cuDNN attention: its program runs on a CPU too
        laid = for_decoding(params, cfg)
        got = in_steps(laid, cfg)
    assert "blocks" not in laid and ("qkv" in laid["blocks_0"]["attn"]) == (kind in ("plain", "int8", "nf4"))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-4)
    np.testing.assert_allclose(in_steps(for_decoding(params, cfg), cfg), want, rtol=1e-4, atol=2e-4)


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("tied", [False, True])
def test_low_matrices_give_the_same_logits(tiny, tied):
    """With dtype=bfloat16 the decoding layout stores matrices in bfloat16; the logits hardly change."""
    cfg, params = tiny("llama", tie_embeddings=tied, dtype="bfloat16")
    with compiling_for("gpu", capability=7.5):
        laid = for_decoding(params, cfg)
        matrices = {
            path: leaf for path, leaf in tree.flatten(laid).items() if path.endswith(("kernel", "embedding", "/w"))
        }
        assert {leaf.dtype.name for leaf in matrices.values()} == {"bfloat16"}
        head = laid["wte"]["embedding"].shape[0] if tied else laid["lm_head"]["kernel"].shape[1]
        assert head == 128
        # XLA elides different bfloat16 roundings in the two programs
        np.testing.assert_allclose(forward(laid, TOKENS, cfg), forward(params, TOKENS, cfg), atol=0.1)
        got = generate(laid, [[3, 1, 4]], cfg, max_new_tokens=8, key=jax.random.key(0))
        assert got == generate(params, [[3, 1, 4]], cfg, max_new_tokens=8, key=jax.random.key(0))
        w, x = params["blocks"]["mlp"]["up"]["kernel"][0], params["wte"]["embedding"]
        low = matmul(w.astype(jnp.bfloat16), x, "bfloat16")
        np.testing.assert_array_equal(low, matmul(w, x, "bfloat16"))


def test_many_layers_stay_a_stack(tiny, monkeypatch):
    cfg, params = tiny("llama")
    monkeypatch.setattr("gptjax.model.gpt._MAX_UNSTACKED", 1)
    with compiling_for("gpu", capability=7.5):
        laid = for_decoding(params, cfg)
        assert laid["blocks"]["attn"]["qkv"]["kernel"].shape == (2, 32, 64)
        np.testing.assert_allclose(in_steps(laid, cfg), forward(params, TOKENS, cfg), rtol=1e-4, atol=1e-4)


def test_a_tpu_and_a_mesh_get_what_there_is(tiny):
    cfg, params = tiny("llama")
    with compiling_for("tpu"):
        assert for_decoding(params, cfg) is params


@pytest.mark.slow
@pytest.mark.first_cases(2)
@pytest.mark.parametrize("make", [int8, nf4])
@pytest.mark.parametrize("widths", [(64, 32, 32), (48, 16, 16), (192, 64, 64)])
def test_quantised_matrices_side_by_side(make, widths):
    keys = jax.random.split(jax.random.key(0), 3)
    leaves = [
        make(jax.random.normal(key, (128, n)) * (i + 1)) for i, (key, n) in enumerate(zip(keys, widths, strict=True))
    ]
    np.testing.assert_array_equal(dense(side_by_side(*leaves)), jnp.concatenate([dense(leaf) for leaf in leaves], 1))
    assert side_by_side(leaves[0], jnp.zeros((128, 8))) is None
    assert side_by_side(jnp.zeros((128, 8)), leaves[0]) is None
    assert side_by_side(jnp.zeros((2, 8)), jnp.zeros((2, 8), jnp.bfloat16)) is None


@pytest.mark.first_cases(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [int8, nf4])
def test_one_row_on_a_gpu_reads_no_float_matrix(make, dtype):
    """A single row is multiplied as a sum over the integers; the program has no `dot_general` with a float matrix."""
    leaf, x = make(jax.random.normal(jax.random.key(0), (128, 48))), jax.random.normal(jax.random.key(1), (1, 1, 128))
    with compiling_for("gpu"):
        x, want = x.astype(dtype), x.astype(dtype).astype(jnp.float32) @ dense(leaf)
        leaf = transposed(leaf)
        got = matmul(leaf, x, dtype)
        text = str(jax.make_jaxpr(lambda leaf, x: matmul(leaf, x, dtype))(leaf, x))
        many = str(jax.make_jaxpr(lambda leaf, x: matmul(leaf, x, dtype))(leaf, jnp.repeat(x, 2, 1)))
        rows = matmul(leaf, jnp.repeat(x, 2, 1), dtype)
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2e-5 if dtype == "float32" else 8e-3, atol=2e-2)
    np.testing.assert_allclose(rows[:, :1], got, rtol=2e-5 if dtype == "float32" else 2e-2, atol=5e-2)
    assert got.dtype == x.dtype and "dot_general" not in text and "dot_general" in many


def test_what_is_laid_out_already_stays(tiny):
    cfg, params = tiny("llama")
    laid = for_decoding(params, cfg)
    assert for_decoding(laid, cfg) is laid
