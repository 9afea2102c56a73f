"""Partitioning a model into trainable and frozen params, and combining them again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import UserError, config, tree
from gptjax.losses import class_logits
from gptjax.tasks import trainable
from gptjax.types import Mean

WAYS = {
    "lora": [],
    "lora on int8": ["finetune.quantize=int8"],
    "dora": ["lora.dora=true"],
    "miss": ["lora.miss=true"],
    "miss on int8": ["lora.miss=true", "finetune.quantize=int8"],
    "pissa": ["lora.init=pissa"],
    "pissa on int8": ["lora.init=pissa", "finetune.quantize=int8"],
    "all": ["finetune.trainable=all"],
    "the last layer": ["finetune.trainable=blocks/1/** | ln_f/**"],
    "norms": ["finetune.trainable=*/scale"],
}
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model(tiny):
    cfg, params = tiny("llama", n_classes=2)
    return cfg, params


def configured(*overrides):
    return config.load_config(None, "task=classify", "classify.source=x.csv", "lora.rank=4", *overrides)


def partitioned(model, way):
    cfg, params = model
    return trainable.partition(configured(*WAYS[way]), *trainable.split_heads(params), cfg, KEY)


@pytest.mark.first_cases(1)
@pytest.mark.parametrize("way", WAYS)
def test_combined_and_merged_params_give_the_same_logits(model, way):
    cfg, params = model
    split = partitioned(model, way)
    tokens = np.arange(12).reshape(2, 6)
    want = gptjax.forward(params, tokens, cfg)
    tolerance = 5e-2 * np.abs(want).max() if "int8" in way else 1e-4
    for combine in (split.combine, split.merge):
        combined = combine(split.params, split.frozen)
        np.testing.assert_allclose(gptjax.forward(combined, tokens, cfg), want, atol=tolerance)
        np.testing.assert_array_equal(combined["cls_head"]["kernel"], params["cls_head"]["kernel"])
    merged = split.merge(split.params, split.frozen)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    body = {name: node for name, node in params.items() if name != "cls_head"}
    if "dora" not in way:
        shapes = trainable.abstract_trained(configured(*WAYS[way]), body, {"cls_head": params["cls_head"]}, cfg)
        assert tree.size(shapes) == tree.size(split.params)


def test_the_base_is_quantised_with_every_adapter_initialisation(model):
    from gptjax.ops.quant import Int8

    for way in ("lora on int8", "pissa on int8"):
        assert isinstance(partitioned(model, way).frozen["blocks"]["attn"]["q"]["kernel"], Int8)


@pytest.mark.slow
def test_gradients_and_optimizer_state_exist_only_for_trained_params(model):
    cfg, _ = model
    split = partitioned(model, "the last layer")
    assert {path.split("/")[0] for path in tree.flatten(split.params)} == {"blocks_1", "ln_f", "cls_head"}
    state = gptjax.TrainState.create(
        split.params, frozen=split.frozen, tx=trainable.optimizer(configured(*WAYS["the last layer"])), key=KEY
    )
    n = tree.size(split.params)
    assert 2 * n <= tree.size([a for a in jax.tree.leaves(state.opt_state) if hasattr(a, "size")]) <= 2 * n + 20

    def loss(params, batch, key):
        logits = class_logits(params, batch, jnp.ones_like(batch), cfg)
        return Mean(jax.nn.logsumexp(logits), jnp.float32(2)), {}

    step = jax.jit(gptjax.make_train_step(loss, trainable.optimizer(configured()), combine=split.combine))
    before = jax.tree.map(np.asarray, split.frozen)
    state = gptjax.TrainState.create(split.params, frozen=split.frozen, tx=trainable.optimizer(configured()), key=KEY)
    state, _ = step(state, np.arange(12).reshape(2, 6))
    jax.tree.map(np.testing.assert_array_equal, state.frozen, before)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, split.params)
    assert all(jax.tree.leaves(changed["blocks_1"]["attn"]))


def test_lora_plus_multiplies_the_learning_rate_of_b():
    adapter = {"adapter": {"q": {"kernel": {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 3))}}}}
    updates = []
    for ratio in (1, 16):
        tx = trainable.optimizer(configured(f"lora.lr_ratio={ratio}", "optim.warmup_steps=0"))
        updates.append(tx.update(adapter, tx.init(adapter), adapter)[0]["adapter"]["q"]["kernel"])
    np.testing.assert_allclose(updates[1]["b"], 16 * updates[0]["b"], rtol=1e-6)
    np.testing.assert_array_equal(updates[1]["a"], updates[0]["a"])


@pytest.mark.parametrize("pattern", ["blocks/7/*", "blocks/1/attn/z/*", "nothing"])
def test_a_pattern_without_a_match_is_refused(model, pattern):
    with pytest.raises(UserError, match=r"finetune.trainable: .* matches no parameter; there are"):
        WAYS["bad"] = [f"finetune.trainable={pattern}"]
        try:
            partitioned(model, "bad")
        finally:
            del WAYS["bad"]
