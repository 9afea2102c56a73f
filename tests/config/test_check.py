"""Validation: ranges, combinations, settings without effect, and configs constructed in Python."""

import dataclasses
import re
import time

import pytest

from gptjax import config
from gptjax.config import Config, ModelConfig, TrainConfig, check, validate
from gptjax.config.schema import NOT_NEGATIVE, leaf_fields
from gptjax.errors import UserError


def test_large_numbers_have_a_short_list_of_divisors(complaint):
    start = time.process_time()
    text = complaint("tiny-gpt2", "model.n_head=2147483646", "model.n_kv_head=4", "train.batch_size=2147483647",
                     "train.accumulation=2")  # fmt: skip
    assert time.process_time() - start < 1.0 and "must be divisible" in text and "must divide" in text


INVALID = [
    (("model.n_head=3", "model.d_model=32"), "n_head can be 1, 2, 4, 8, 16, 32"),
    (("model.n_head=12", "model.d_model=48", "model.n_kv_head=5"), "use one of 1, 2, 3, 4, 6, 12"),
    (("model.arch=llama", "model.d_model=30", "model.n_head=10"), "must be even"),
    (("model.position=sinusoidal", "model.d_model=33", "model.n_head=3"), "even model.d_model"),
    (("model.n_layer=0",), "at least 1"),
    (("model.n_layer=99999999999999",), "at most"),
    (("model.dropout=1",), "model.dropout"),
    (("model.vocab_size=-1",), "model.vocab_size"),
    (("optim.lr=-1e-3",), "optim.lr (-0.001) must be above 0"),
    (("optim.lr=nan",), "optim.lr (nan)"),
    (("optim.lr=inf",), "optim.lr (inf)"),
    (("optim.weight_decay=nan",), "optim.weight_decay"),
    (("optim.beta2=1",), "optim.beta2"),
    (("optim.warmup_steps=50", "train.max_steps=50"), "must be below train.max_steps"),
    (("optim.min_lr_ratio=1.5",), "from 0 to 1"),
    (("train.max_steps=0",), "train.max_steps"),
    (("train.accumulation=5",), "use one of 1, 2, 4, 8"),
    (("train.eval_every=0",), "train.eval_every"),
    (("train.epochs=0",), "train.epochs"),
    (("train.ema=1",), "train.ema"),
    (("train.ema=0.9", "train.average_last=5"), "two averages of the same weights"),
    (("train.average_last=2.5",), "must be a whole number of steps, or a fraction below 1"),
    (("train.average_last=51", "train.max_steps=50"), "(51) must be at most train.max_steps (50)"),
    (("train.average_last=5", "train.patience=1", "train.eval_every=1"), "use train.ema"),
    (("train.patience=4", "train.eval_every=10", "train.max_steps=50"), "the earliest stop is at step 50"),
    (("train.loggers=[tensorbord]",), "tensorboard, wandb"),
    (("data.weights=[1,2]",), "2 values for 1 sources"),
    (("data.weights=[0]",), "must have a positive sum"),
    (("data.weights=[-1]",), "data.weights"),
    (("data.mask_tokens=4",), "from 0 to 3"),
    (("data.mask_tokens=3", "model.context_length=2"), "must be below model.context_length"),
    (("data.val_fraction=1",), "data.val_fraction"),
    (("data.source=[]",), "data.source is empty"),
    (("data.streaming=true",), "hf: sources only"),
    (("data.stride=0",), "data.stride"),
    (("sample.top_p=0",), "sample.top_p"),
    (("sample.temperature=-1",), "sample.temperature"),
    (("seed=-1",), "seed"),
    (("sample.top_k=4294967295",), "sample.top_k (4294967295)"),
    (("tokenizer.name=",), "tokenizer.name is empty"),
]


@pytest.mark.parametrize(("overrides", "words"), INVALID, ids=[" ".join(o) for o, _ in INVALID])
def test_invalid_values_and_combinations_are_refused(complaint, overrides, words):
    text = complaint("tiny-gpt2", *overrides)
    assert words in text and "[" in text and "load_config" in text


NO_EFFECT = [
    ("optim.name=adamw", "optim.momentum=0.9"),
    ("optim.name=adamw", "optim.normuon=0.95"),
    ("optim.weight_decay=0", "optim.cautious_decay=true"),
    ("optim.weight_decay=0", "optim.weight_decay_schedule=linear"),
    ("optim.schedule=cosine", "optim.decay_fraction=0.1"),
    ("optim.schedule=constant", "optim.min_lr_ratio=0.1"),
    ("optim.warmup_steps=0", "optim.initial_lr_ratio=0.1"),
    ("lora.miss=true", "lora.alpha=8"),
    ("lora.miss=true", "lora.scaling=alpha/sqrt(r)"),
    ("prefer.loss=dpo", "prefer.margin=0.5"),
    ("distill.divergence=forward", "distill.beta=0.1"),
    ("distill.on_policy=0.5", "distill.packing=packed"),
    ("distill.on_policy=0", "distill.sampling_temperature=0.5"),
    ("distill.on_policy=0", "distill.max_new_tokens=8"),
    ("sample.temperature=0", "sample.top_k=5"),
    ("sample.temperature=0", "sample.top_p=0.9"),
    ("sample.temperature=0", "sample.min_p=0.1"),
    ("model.position=learned", "model.rope_base=5000"),
    ("model.sliding_window=0", "model.window_pattern=SL"),
    ("model.init=torch", "model.embed_std=0.1"),
    ("model.qk_norm=false", "model.qk_gain=2"),
    ("data.val_source=b.txt", "data.val_fraction=0.2"),
    ("sample.draft=null", "sample.ahead=2"),
    ("sample.pick=majority", "sample.reward_model=runs/x"),
]


@pytest.mark.parametrize(("disabling", "given"), NO_EFFECT, ids=[" ".join(pair) for pair in NO_EFFECT])
def test_a_setting_without_effect_is_refused_on_the_command_line(complaint, disabling, given):
    group = given.partition(".")[0]
    task = [f"task={group}"] if group in ("prefer", "distill") else ["task=prefer"] if group == "lora" else []
    text = complaint(None, *task, disabling, given)
    assert f"{given.partition('=')[0]} would have no effect: {disabling.partition('=')[0]}=" in text


def test_every_rule_about_settings_without_effect_is_tested():
    tested = {disabling.partition("=")[0] for disabling, _ in NO_EFFECT}
    assert {disabling for _, disabling, _ in config.WITHOUT_EFFECT} == tested


def test_rules_and_ranges_are_about_existing_settings():
    named = [keys for keys, _, _ in (*check.MODEL_RULES, *check.RULES) if not callable(keys)]
    assert {key for keys in named for key in keys} <= set(config.schema())
    bounded = [key for key, item in leaf_fields().items() if item.metadata["range"] != NOT_NEGATIVE]
    assert len(bounded) > 60 and all(re.search("int|float", config.type_name(config.schema()[key])) for key in bounded)


def test_configs_constructed_in_python_are_checked_by_the_same_rules():
    cfg = dataclasses.replace(Config(), train=TrainConfig(batch_size=7, accumulation=2))
    with pytest.raises(UserError, match="accumulation .* must divide"):
        validate(cfg)
    with pytest.raises(UserError, match="n_head can be"):
        dataclasses.replace(ModelConfig(), n_head=7)


INVALID_MODELS = [
    (dict(arch="lama"), "model.arch: expected gpt2, llama or modern, got 'lama'"),
    (dict(n_head=5, d_model=32), "must be divisible by model.n_head"),
    (dict(n_layer="2"), "model.n_layer: expected int, got '2'"),
    (dict(n_layer=True), "model.n_layer: expected int, got True"),
    (dict(n_layer=2.0), "model.n_layer: expected int, got 2.0"),
    (dict(n_layer=0), r"model.n_layer \(0\) must be at least 1"),
    (dict(d_model=None), "model.d_model: expected int, got None"),
    (dict(dropout=1.0), "model.dropout"),
    (dict(norm="batch"), "model.norm: expected layernorm, rmsnorm or null, got 'batch'"),
    (dict(tie_embeddings=1), "model.tie_embeddings: expected true, false or null"),
    (dict(n_head=4, n_kv_head=3, d_model=32), "must be divisible by model.n_kv_head"),
    (dict(arch="llama", n_head=4, d_model=36), "must be even"),
    (dict(window_pattern="X"), "must consist of S"),
]


@pytest.mark.parametrize(("values", "words"), INVALID_MODELS, ids=[str(values) for values, _ in INVALID_MODELS])
def test_a_model_config_constructed_in_python_is_checked(values, words):
    with pytest.raises(UserError, match=words):
        ModelConfig(**values)


def test_tracers_are_not_checked():
    import jax
    import jax.numpy as jnp

    rates = jax.vmap(lambda rate: ModelConfig(dropout=rate).dropout * 2)(jnp.array([0.1, 0.2]))
    assert rates.tolist() == pytest.approx([0.2, 0.4])
