"""Numerics of programs traced for accelerators in bfloat16, and error messages for wrong input."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import lora
from gptjax.config import LoraConfig
from gptjax.errors import UserError
from gptjax.losses import next_token, token_log_probs
from gptjax.model.cache import init_cache
from gptjax.model.gpt import extend, for_decoding, forward, init_params
from gptjax.model.layers import layers_per_iteration
from gptjax.ops.device import compiling_for
from gptjax.ops.quant import quantize
from gptjax.training.step import TrainState, make_train_step
from gptjax.types import Batch, Mean


def config(arch: str, **changes):
    return gptjax.ModelConfig(arch=arch, vocab_size=64, context_length=16, n_layer=2, n_head=2, d_model=16, **changes)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("arch", ["gpt2", "llama", "modern"])
def test_every_arch_is_traced_in_bfloat16(arch, platform):
    cfg = config(arch, dtype="bfloat16")
    params = gptjax.abstract_params(cfg)
    ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    loss = next_token(cfg)
    with compiling_for(platform):
        logits = jax.eval_shape(lambda p, x: forward(p, x, cfg), params, ids)
        step, _ = jax.eval_shape(lambda p, x: extend(p, x, cfg, init_cache(cfg, 2, 16, jnp.bfloat16)), params, ids)
        grads = jax.eval_shape(jax.grad(lambda p, b: loss(p, b, None)[0].total), params, Batch(ids, ids))
    assert logits.dtype == step.dtype == jnp.float32
    assert jax.tree.map(lambda g: (g.shape, g.dtype), grads) == jax.tree.map(lambda p: (p.shape, p.dtype), params)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_keep_the_float32_sum(tied):
    cfg = config("llama", dtype="bfloat16", tie_embeddings=tied, unroll=False)
    params = init_params(jax.random.key(0), cfg)
    ids = jnp.arange(16)[None]
    with compiling_for("gpu", capability=7.5):  # uses XLA attention, which runs on a CPU
        logits = np.asarray(jax.jit(lambda p: forward(p, ids, cfg))(params))
    rounded = logits.astype(jnp.bfloat16).astype(np.float32)
    assert (logits != rounded).mean() > 0.9


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (np.arange(8), r"expected integer ids \[B, T\], got int64\[8\]"),
        (np.full((1, 4), 64), "from 64 to 64, but the vocabulary size is 64"),
        (np.full((1, 4), -1), "from -1 to -1"),
        (np.zeros((1, 17), np.int32), "17 per row, and the position table has 16"),
        ([[1, 2]], "got list"),
        (np.zeros((1, 4)), "got float64"),
    ],
)
def test_forward_names_wrong_tokens(tokens, text):
    cfg = config("gpt2")
    with pytest.raises(UserError, match=text):
        forward(init_params(jax.random.key(0), cfg), tokens, cfg)


def test_a_traced_config_is_named():
    cfg = config("gpt2")
    with pytest.raises(UserError, match="static_argnums"):
        forward({}, jnp.zeros((1, 2), jnp.int32), dataclasses.asdict(cfg))


@pytest.mark.parametrize(
    "wrong", [lambda x: x, lambda x: (x, {}), lambda x: (Mean(x, 1.0), None), lambda x: Mean(x, 1.0)]
)
def test_a_loss_of_another_form_is_named(wrong):
    import optax

    state = TrainState.create({"w": jnp.ones(3)}, tx=optax.sgd(0.1), key=jax.random.key(0))
    step = make_train_step(lambda params, batch, key: wrong(params["w"].sum()), optax.sgd(0.1))
    with pytest.raises(UserError, match=r"expected \(Mean\(total, weight\), metrics dict\)"):
        step(state, None)


@pytest.mark.parametrize("prompts", ["text", ["text"], jnp.ones((1, 3), jnp.int32), [1, 2]])
def test_prompts_of_another_form_are_named(prompts):
    cfg = config("gpt2")
    with pytest.raises(UserError, match="expected lists of token ids"):
        gptjax.generate(init_params(jax.random.key(0), cfg), prompts, cfg, max_new_tokens=2, key=jax.random.key(0))


def test_top_p_keeps_the_smallest_set():
    from gptjax.generation.sampling import top_p

    kept = lambda p, logits: np.flatnonzero(np.isfinite(np.asarray(top_p(p)(jnp.array([logits])))[0])).tolist()  # noqa: E731
    assert kept(0.09, [0.0] * 50) == [0, 1, 2, 3, 4]
    assert kept(0.0, [0.0, 1.0, 2.0]) == [2]
    assert kept(0.7, [1.0, 3.0, 3.0, 0.0]) == [1, 2]
    assert kept(0.3, [1.0, 3.0, 3.0, 0.0]) == [1]


def test_flops_count_heads_times_their_size():
    from gptjax.training.flops import flops_per_token

    cfg, wide = config("llama", d_head=8), config("llama", d_head=32)
    attention = [
        flops_per_token(c, gptjax.abstract_params(c)) - flops_per_token(c, gptjax.abstract_params(c), width=1)
        for c in (cfg, wide)
    ]
    assert attention[0] == 12 * 2 * 16 * 15
    assert attention[1] == 4 * attention[0]


def test_olora_is_the_qr_of_the_stored_orientation():
    from gptjax import lora

    w = np.random.default_rng(0).normal(size=(20, 32)).astype(np.float32)  # [out, in]
    cfg = gptjax.LoraConfig(rank=4, alpha=4, init="olora", targets="q/kernel")
    rest, adapter = lora.init_from_weights({"q": {"kernel": jnp.array(w.T)}}, cfg)
    q, r = np.linalg.qr(w)
    pair = adapter["q"]["kernel"]
    np.testing.assert_allclose(np.abs(pair["b"]), np.abs(q[:, :4].T), atol=1e-5)
    np.testing.assert_allclose(np.abs(pair["a"]), np.abs(r[:4].T), atol=1e-4)
    np.testing.assert_allclose(rest["q"]["kernel"] + pair["a"] @ pair["b"], w.T, atol=1e-4)


def test_adapters_are_decayed_and_use_the_learning_rate_of_matrices():
    from gptjax.config import OptimConfig
    from gptjax.optim import make_optimizer

    params = {"adapter": {"blocks": {"q": {"kernel": {"a": jnp.ones((2, 6, 3)), "b": jnp.ones((2, 3, 6))}}}}}
    for name in ("adamw", "muon"):
        tx = make_optimizer(
            OptimConfig(name=name, lr=0.1, vector_lr=1.0, weight_decay=0.5, schedule="constant", warmup_steps=0), 10
        )
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        for leaf in jax.tree.leaves(updates):
            np.testing.assert_allclose(leaf, -0.05, rtol=1e-5)


@pytest.mark.slow
def test_targets_and_cached_tokens_out_of_range_are_noticed_where_they_are_known():
    cfg = gptjax.ModelConfig(vocab_size=64, context_length=16, n_layer=1, n_head=2, d_model=16)
    params = gptjax.init_params(jax.random.key(0), cfg)
    tokens = jnp.zeros((1, 4), jnp.int32)
    loss = next_token(cfg)
    for bad in (99, -1):
        batch = Batch(tokens, tokens.at[0, 2].set(bad))
        with pytest.raises(UserError, match=r"targets: the ids range from .* expected 0 to 63"):
            loss(params, batch, None)
        ignored = batch._replace(weights=jnp.ones((1, 4)).at[0, 2].set(0))  # as other libraries do with target -100
        assert np.isfinite(float(loss(params, ignored, None)[0].total))
        assert np.isfinite(float(jax.jit(loss)(params, batch, None)[0].total))
        with pytest.raises(UserError, match=r"tokens: the ids range from .* expected 0 to 63"):
            extend(params, tokens.at[0, 2].set(bad), cfg, init_cache(cfg, 1, 8))
    with pytest.raises(UserError, match="targets: .* vocabulary size is 64"):
        token_log_probs(params, Batch(tokens, tokens + 64), cfg)
    cache = init_cache(cfg, 1, 32)
    _, cache = extend(params, jnp.zeros((1, 12), jnp.int32), cfg, cache)
    with pytest.raises(UserError, match="24 with those in the cache, .* 32 slots, the position table 16"):
        extend(params, jnp.zeros((1, 12), jnp.int32), cfg, cache)
    extend(params, jnp.zeros((1, 12), jnp.int32), cfg, cache, lengths=jnp.array([4]))
    with pytest.raises(UserError, match="10 with those in the cache, and the cache has 8 slots"):
        extend(params, jnp.zeros((1, 10), jnp.int32), cfg, init_cache(cfg, 1, 8))


def test_top_p_reaches_p_in_exact_numbers():
    """5 of 50 equally likely tokens have probability 0.1, but their float32 sum is slightly less."""
    from gptjax.generation.sampling import top_p

    for n, p, kept in ((50, 0.1, 5), (10, 0.3, 3), (20, 0.95, 19), (7, 0.5, 4)):
        assert int(jnp.isfinite(top_p(p)(jnp.zeros((1, n)))).sum()) == kept


def test_a_mesh_is_made_of_a_mesh_config():
    with pytest.raises(UserError, match="expected a MeshConfig"):
        gptjax.parallel.make_mesh({"data": 1})


def adapted(params, **settings):
    cfg = LoraConfig(rank=2, targets="lm_head/*" if "lm_head" in params else "wte/*", **settings)
    adapter = jax.tree.map(lambda a: a + 0.1, lora.init(jax.random.key(1), params, cfg))
    return lora.attach(params, adapter, cfg)


HEADS = {
    "int8": lambda params, cfg: quantize(params, (("wte/*", "int8"), ("*", "none"))),
    "int8 apart": lambda params, cfg: quantize(params, (("lm_head/*", "int8"), ("*", "none"))),
    "nf4 apart": lambda params, cfg: quantize(params, (("lm_head/*", "nf4"), ("*", "none"))),
    "lora": lambda params, cfg: adapted(params),
    "lora apart": lambda params, cfg: adapted(params),
    "dora apart": lambda params, cfg: adapted(params, dora=True),
    "decoding": for_decoding,
    "decoding apart": for_decoding,
}


@pytest.mark.first_cases(3)
@pytest.mark.parametrize("kind", HEADS)
def test_logits_of_every_kind_of_head_are_not_rounded(kind):
    cfg = config("llama", dtype="bfloat16", tie_embeddings="apart" not in kind)
    params = HEADS[kind](init_params(jax.random.key(0), cfg), cfg)
    logits = np.asarray(jax.jit(lambda params, tokens: forward(params, tokens, cfg))(params, jnp.arange(8)[None]))
    assert logits.dtype == np.float32
    assert (logits.astype(jnp.bfloat16).astype(np.float32) == logits).mean() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_a_gpu_are_those_of_the_vocabulary(tied):
    cfg = config("llama", tie_embeddings=tied)
    params, ids = init_params(jax.random.key(0), cfg), jnp.arange(16)[None]
    want = forward(params, ids, cfg)
    with compiling_for("gpu", capability=7.5):  # uses XLA attention, which runs on a CPU
        got = forward(params, ids, cfg)
        lowered = jax.make_jaxpr(lambda p: forward(p, ids, cfg))(params)
    assert got.shape == want.shape == (1, 16, 64) and "pad" in str(lowered)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "n_layer", "unroll", "expected"),
    [
        ("gpu", 12, None, 12), ("gpu", 36, None, 12), ("gpu", 30, None, 10), ("gpu", 13, None, 1),
        ("gpu", 12, False, 1), ("tpu", 12, None, 1), ("tpu", 12, True, 12), ("cpu", 2, None, 2), ("cpu", 12, None, 1),
    ],
)  # fmt: skip
def test_how_many_layers_are_unrolled(platform, n_layer, unroll, expected):
    cfg = gptjax.ModelConfig(vocab_size=64, n_layer=n_layer, unroll=unroll)
    with compiling_for(platform):
        assert layers_per_iteration(cfg) == expected
