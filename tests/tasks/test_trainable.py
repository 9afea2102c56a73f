"""A model taken apart for training, and put together again."""

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


def taken_apart(model, way):
    cfg, params = model
    return trainable.partition(configured(*WAYS[way]), *trainable.split_heads(params), cfg, KEY)


@pytest.mark.first_cases(1)
@pytest.mark.parametrize("way", WAYS)
def test_put_together_it_is_the_same_model(model, way):
    cfg, params = model
    parts = taken_apart(model, way)
    tokens = np.arange(12).reshape(2, 6)
    want = gptjax.forward(params, tokens, cfg)
    tolerance = 5e-2 * np.abs(want).max() if "int8" in way else 1e-4
    for together in (parts.combine, parts.merge):
        whole = together(parts.params, parts.frozen)
        np.testing.assert_allclose(gptjax.forward(whole, tokens, cfg), want, atol=tolerance)
        np.testing.assert_array_equal(whole["cls_head"]["kernel"], params["cls_head"]["kernel"])
    plain = parts.merge(parts.params, parts.frozen)
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, params)
    body = {name: node for name, node in params.items() if name != "cls_head"}
    if "dora" not in way:
        shapes = trainable.abstract_trained(configured(*WAYS[way]), body, {"cls_head": params["cls_head"]}, cfg)
        assert tree.size(shapes) == tree.size(parts.params)


def test_the_base_is_quantized_whatever_the_adapter_starts_from(model):
    from gptjax.ops.quant import Int8

    for way in ("lora on int8", "pissa on int8"):
        assert isinstance(taken_apart(model, way).frozen["blocks"]["attn"]["q"]["kernel"], Int8)


def test_gradients_and_optimizer_state_exist_only_for_what_is_trained(model):
    cfg, _ = model
    parts = taken_apart(model, "the last layer")
    assert {path.split("/")[0] for path in tree.flatten(parts.params)} == {"blocks_1", "ln_f", "cls_head"}
    state = gptjax.TrainState.create(
        parts.params, frozen=parts.frozen, tx=trainable.optimizer(configured(*WAYS["the last layer"])), key=KEY
    )
    n = tree.size(parts.params)
    assert 2 * n <= tree.size([a for a in jax.tree.leaves(state.opt_state) if hasattr(a, "size")]) <= 2 * n + 20

    def loss(params, batch, key):
        logits = class_logits(params, batch, jnp.ones_like(batch), cfg)
        return Mean(jax.nn.logsumexp(logits), jnp.float32(2)), {}

    step = jax.jit(gptjax.make_train_step(loss, trainable.optimizer(configured()), combine=parts.combine))
    before = jax.tree.map(np.asarray, parts.frozen)
    state = gptjax.TrainState.create(parts.params, frozen=parts.frozen, tx=trainable.optimizer(configured()), key=KEY)
    state, _ = step(state, np.arange(12).reshape(2, 6))
    jax.tree.map(np.testing.assert_array_equal, state.frozen, before)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, parts.params)
    assert all(jax.tree.leaves(moved["blocks_1"]["attn"]))


def test_a_larger_rate_for_b():
    adapter = {"adapter": {"q": {"kernel": {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 3))}}}}
    updates = []
    for ratio in (1, 16):
        tx = trainable.optimizer(configured(f"lora.lr_ratio={ratio}", "optim.warmup_steps=0"))
        updates.append(tx.update(adapter, tx.init(adapter), adapter)[0]["adapter"]["q"]["kernel"])
    np.testing.assert_allclose(updates[1]["b"], 16 * updates[0]["b"], rtol=1e-6)
    np.testing.assert_array_equal(updates[1]["a"], updates[0]["a"])


@pytest.mark.parametrize("pattern", ["blocks/7/*", "blocks/1/attn/z/*", "nothing"])
def test_a_pattern_that_matches_nothing(model, pattern):
    with pytest.raises(UserError, match=r"finetune.trainable: .* matches no parameter; there are"):
        WAYS["bad"] = [f"finetune.trainable={pattern}"]
        try:
            taken_apart(model, "bad")
        finally:
            del WAYS["bad"]
