"""The cost formulas against published numbers, allocated caches, and compiled programs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from gptjax import tree
from gptjax.config import ModelConfig
from gptjax.model.cache import init_cache
from gptjax.model.gpt import abstract_params, forward
from gptjax.planning import hlo
from gptjax.research.architectures import attention, costs, deltanet, mla, moe, sliding_window


def gigabytes(n):
    return round(n / 1e9, 2)


# the book's example: 32 layers, 32 heads, d_model 4096, 32,768 tokens, bfloat16
BIG = ModelConfig(arch="llama", d_model=4096, n_head=32, n_layer=32, context_length=32768)
GQA = dataclasses.replace(BIG, n_kv_head=8)
FIVE_TO_ONE = dict(sliding_window=1024, window_pattern="SSSSSL")


def test_grouped_queries():
    assert costs.kv_cache_bytes(BIG) == 17_179_869_184 and gigabytes(costs.kv_cache_bytes(BIG)) == 17.18
    assert costs.kv_cache_bytes(GQA) == 4_294_967_296 and gigabytes(costs.kv_cache_bytes(GQA)) == 4.29
    assert costs.kv_cache_bytes(BIG) / costs.kv_cache_bytes(GQA) == 4.00


def test_sliding_windows():
    """Five layers with a window of 1,024 per full-attention layer: 27 and 5 of 32 layers."""
    narrow, both = (dataclasses.replace(cfg, **FIVE_TO_ONE) for cfg in (BIG, GQA))
    assert (narrow.windows.count(1024), narrow.windows.count(0)) == (27, 5)
    assert costs.kv_cache_bytes(narrow) == 3_137_339_392 and gigabytes(costs.kv_cache_bytes(narrow)) == 3.14
    assert costs.kv_cache_bytes(both) == 784_334_848 and gigabytes(costs.kv_cache_bytes(both)) == 0.78


def test_latent_attention():
    """The book rounds the size of 24 heads of a d_model of 2048 up to 86 channels."""
    heads = ModelConfig(
        arch="llama", d_model=2048, n_head=24, n_kv_head=24, d_head=math.ceil(2048 / 24), n_layer=48,
        context_length=8192,
    )  # fmt: skip
    latent = mla.Config(2048, n_head=24, d_head=86, d_latent=1024, d_rope=0)
    full, small = costs.kv_cache_bytes(heads), costs.mla_cache_bytes(latent, 48, 8192)
    assert (full, small) == (3_246_391_296, 805_306_368)
    assert (gigabytes(full), gigabytes(small)) == (3.25, 0.81)
    assert gigabytes(costs.kv_cache_bytes(dataclasses.replace(heads, n_kv_head=6))) == 0.81
    assert (round(full / small, 2), round(100 * (1 - small / full), 2)) == (4.03, 75.19)


def test_experts():
    """8 experts, 2 of them active, with a total hidden size of 14,336."""
    cfg = moe.Config(7168, d_ff=14336 // 8, n_expert=8, n_active=2)
    assert cfg.d_ff == 1792
    assert costs.moe_params(cfg) == (38_535_168, 57_344, 308_338_688, 77_127_680)
    assert 8 * costs.moe_params(cfg).expert == 3 * 7168 * 14336 == 308_281_344
    assert tree.size(jax.eval_shape(lambda: moe.init(jax.random.key(0), cfg))) == 308_338_688


def test_deltanet_state():
    """The state has B h d d elements per layer, a KV cache 2 B T h d: the same size at d / 2 tokens."""
    cfg = deltanet.Config(2048, n_head=16, d_head=128, conv_width=1)
    heads = ModelConfig(arch="llama", d_model=2048, n_head=16, n_kv_head=16, n_layer=1, context_length=64)
    assert costs.deltanet_state_bytes(cfg, 1, batch=3) == 3 * 16 * 128 * 128 * 2 == costs.kv_cache_bytes(heads, 3)


def size_bytes(make):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make)) if leaf.ndim)


def test_the_caches_that_are_made_have_these_sizes():
    small = ModelConfig(arch="llama", d_model=32, n_head=4, n_kv_head=2, n_layer=3, context_length=24)
    made = init_cache(small, 5, dtype=jnp.bfloat16)
    assert made.k.nbytes + made.v.nbytes == costs.kv_cache_bytes(small, 5)
    one_layer, layer_cfg = dataclasses.replace(small, n_layer=1), attention.Config(32, 4, 2)
    assert size_bytes(lambda: attention.init_cache(layer_cfg, 5, 24)) == costs.kv_cache_bytes(one_layer, 5, 4)
    windowed = dataclasses.replace(one_layer, sliding_window=8)
    size = size_bytes(lambda: sliding_window.init_cache(sliding_window.Config(32, 4, 2, window=8), 5))
    assert size == costs.kv_cache_bytes(windowed, 5, 4) * 7 / 8  # the cache has window - 1 slots
    latent = mla.Config(32, n_head=4, d_head=8, d_latent=6, d_rope=2)
    assert size_bytes(lambda: mla.init_cache(latent, 5, 24)) == costs.mla_cache_bytes(latent, 1, 24, 5, 4)
    delta = deltanet.Config(32, n_head=4, d_head=8)
    assert size_bytes(lambda: deltanet.init_cache(delta, 5)) == costs.deltanet_state_bytes(delta, 1, 5, 4)


SIZES = {"small": (12, 12, 768), "medium": (24, 16, 1024), "large": (36, 20, 1280), "xl": (48, 25, 1600)}


@pytest.mark.parametrize(
    ("size", "linear", "attention_percent"),
    [("small", 5.1e11, 15.3), ("medium", 1.4e12, 14.2), ("large", 3.2e12, 12.2), ("xl", 6.4e12, 10.1)],
)
def test_the_flops_of_two_rows_of_1024(size, linear, attention_percent):
    """The book's numbers are without attention, which adds `attention_percent` per cent."""
    n_layer, n_head, d_model = SIZES[size]
    cfg = ModelConfig(n_layer=n_layer, n_head=n_head, d_model=d_model, vocab_size=50257)
    flops = costs.forward_flops(cfg, 2, 1024)
    assert float(f"{flops.linear:.1e}") == linear
    assert round(100 * flops.attention / flops.linear, 1) == attention_percent


PROGRAMS = {
    "gpt2": (ModelConfig(n_layer=2, n_head=4, d_model=128, vocab_size=512, unroll=True), 64, 1),
    "llama, grouped, swiglu": (
        ModelConfig(arch="llama", n_layer=2, n_head=4, n_kv_head=2, d_model=128, d_ff=320, vocab_size=512, unroll=True),
        64,
        1,
    ),
    "two blocks of queries": (ModelConfig(n_layer=1, n_head=2, d_model=128, vocab_size=512, unroll=True), 128, 3 / 4),
}


@pytest.mark.slow
@pytest.mark.cpu
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_formula_is_what_xla_counts(name):
    """Matrix products agree exactly; XLA's total, which includes norms, softmax and activations, within 3 %."""
    cfg, length, share = PROGRAMS[name]
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
    compiled = (
        jax.jit(lambda params, tokens: forward(params, tokens, cfg)).lower(abstract_params(cfg), tokens).compile()
    )
    flops = costs.forward_flops(cfg, 2, length, pairs=int(share * length**2))
    assert hlo.work(compiled.as_text()).flops == flops.total
    assert flops.total < compiled.cost_analysis()["flops"] < 1.03 * flops.total


@pytest.mark.cpu
def test_the_formula_at_the_size_of_gpt2():
    """124 M parameters, 1,024 tokens, lowered only: operations other than matrix products are below 0.5 %."""
    cfg, tokens = ModelConfig(vocab_size=50257, unroll=True), jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    lowered = jax.jit(lambda params, tokens: forward(params, tokens, cfg)).lower(abstract_params(cfg), tokens)
    flops = costs.forward_flops(cfg, 1, 1024, pairs=3 * 1024**2 // 4)
    assert flops.total < lowered.cost_analysis()["flops"] < 1.005 * flops.total
