"""Layers, types, provenance, errors of the configuration; none of it needs jax."""

import copy
import dataclasses
import pickle
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import config
from gptjax.config import (
    Config,
    ModelConfig,
    TrainConfig,
    check,
    diff,
    from_dict,
    from_yaml,
    load_config,
    resolve,
    to_yaml,
    validate,
)
from gptjax.config.schema import NOT_NEGATIVE, leaf_fields
from gptjax.errors import UserError


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def complaint(*args):
    with pytest.raises(UserError) as caught:
        load_config(*args)
    return str(caught.value)


# ---------------------------------------------------------------- layers


def test_later_layers_win_and_every_value_says_where_it_is_from(tmp_path):
    write(tmp_path, "base.yaml", "model:\n  arch: modern\n  n_layer: 3\noptim: {lr: 1e-2}\n")
    top = write(tmp_path, "top.yaml", "base: base.yaml\n\nmodel:\n  n_layer: 5\n")
    cfg, where = resolve(top, "optim.beta2=0.98")
    assert (cfg.model.arch, cfg.model.n_layer, cfg.optim.lr, cfg.optim.beta2) == ("modern", 5, 0.01, 0.98)
    assert where["model.n_layer"].endswith("top.yaml:4")
    assert where["optim.lr"].endswith("base.yaml:4")
    assert where["optim.beta2"] == "load_config"
    assert where["model.norm"] == "arch=modern" and cfg.model.norm == "rmsnorm"
    assert where["train.max_steps"] == "default"
    assert set(where) == set(config.schema())


def test_arch_switches_follow_the_finally_chosen_arch():
    assert load_config("tiny-gpt2", "model.arch=llama").model.norm == "rmsnorm"
    assert load_config("tiny-gpt2", "model.arch=llama", "model.norm=layernorm").model.norm == "layernorm"
    assert load_config("tiny-gpt2", "model.norm=null").model.norm == "layernorm"


def test_base_may_be_a_preset_and_sits_beside_its_file(tmp_path):
    child = write(tmp_path, "x.yaml", "base: tiny-llama\nseed: 7\n")
    assert (load_config(child).model.n_kv_head, load_config(child).seed) == (1, 7)
    deeper = tmp_path / "deeper"
    deeper.mkdir()
    assert load_config(write(deeper, "y.yaml", "base: ../x.yaml\n")).seed == 7


def test_base_that_leads_back_to_itself(tmp_path):
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    assert "leads back" in complaint(write(tmp_path, "b.yaml", "base: a.yaml\n"))


def test_run_dir_is_named_after_the_config(tmp_path):
    assert load_config("tiny-gpt2").run_dir == "runs/tiny-gpt2"
    assert load_config(write(tmp_path, "mine.yaml", "seed: 1")).run_dir == "runs/mine"
    assert load_config("tiny-gpt2", "run_dir=elsewhere").run_dir == "elsewhere"


def test_a_run_directory_is_a_config(tmp_path):
    write(tmp_path, "config.yaml", to_yaml(load_config("tiny-llama", "seed=5")))
    assert load_config(tmp_path) == load_config("tiny-llama", "seed=5", f"run_dir={tmp_path}")  # wherever it lies now


def test_a_model_config_is_a_static_argument():
    assert hash(load_config("tiny-gpt2")) == hash(load_config("tiny-gpt2"))
    assert dataclasses.replace(ModelConfig(), n_layer=3).n_layer == 3


# ---------------------------------------------------------------- types


TYPED = [
    ("optim.lr=1e-3", 1e-3),
    ("optim.lr=1", 1.0),
    ("--optim.lr=3e-4", 3e-4),
    ("train.max_steps=1e3", 1000),
    ("train.max_steps=1_000", 1000),
    ("--train.max-steps=7", 7),
    ("data.stride=null", None),
    ("data.stride=none", None),
    ("data.source=a.txt", ("a.txt",)),
    ("data.source=[a.txt, hf:org/name]", ("a.txt", "hf:org/name")),
    ("data.source=['a, b.txt']", ("a, b.txt",)),
    ("data.source=(a.txt,)", ("a.txt",)),
    ("data.val_source=[]", ()),
    ("data.document_mask=off", False),
    ("data.document_mask=True", True),
    ("sample.prompt=a=b=c", "a=b=c"),
    ("sample.prompt=", ""),
    ("sample.prompt=none", "none"),
    ("sample.prompt=1.50", "1.50"),
    ("sample.prompt=${optim.lr}", "${optim.lr}"),
    ("sample.prompt=???", "???"),
    ("sample.prompt=[a, b", "[a, b"),
    ("sample.prompt=  two  ", "  two  "),
    ("tokenizer.name=C:\\x=y", "C:\\x=y"),
]


@pytest.mark.parametrize(("override", "value"), TYPED, ids=[text for text, _ in TYPED])
def test_text_becomes_the_type_of_its_field(override, value):
    key = override.removeprefix("--").partition("=")[0].replace("-", "_")
    got = config.flat(load_config("tiny-gpt2", override))[key]
    assert got == value and type(got) is type(value)


def test_lists_of_numbers():
    assert load_config(None, "data.source=[a,b]", "data.weights=[0.8, 1]").data.weights == (0.8, 1.0)
    assert load_config(None, "data.weights=0.5").data.weights == (0.5,)


def test_a_flag_takes_the_next_word():
    assert load_config(None, "--optim.lr", "2e-3", "seed=4").optim.lr == 2e-3


def test_yaml_reads_values_by_the_schema_not_by_yaml(tmp_path):
    text = "optim:\n  lr: 1e-3\nsample: {prompt: on}\ndata:\ntrain.max_steps: 010\n"
    cfg = load_config(write(tmp_path, "x.yaml", text))
    assert (cfg.optim.lr, cfg.sample.prompt, cfg.train.max_steps) == (1e-3, "on", 10)


BAD_TYPES = [
    ("optim.lr=abc", "a number"),
    ("optim.lr=", "a number"),
    ("optim.lr=${model.n_layer}", "a number"),
    ("optim.lr=???", "a number"),
    ("optim.lr=true", "a number"),
    ("model.n_layer=six", "a whole number"),
    ("model.n_layer=6.5", "a whole number"),
    ("model.n_layer=null", "a whole number"),
    ("model.arch=gpt3", "gpt2, llama or modern"),
    ("model.norm=${x", "layernorm or rmsnorm"),
    ("data.document_mask=2", "true or false"),
    ("data.weights=[1,2", "not closed"),
    ("data.weights=[[1]]", "not a flat list"),
    ("data.weights=[x]", "a list of numbers"),
]


@pytest.mark.parametrize(("override", "expected"), BAD_TYPES, ids=[text for text, _ in BAD_TYPES])
def test_a_wrong_type_names_key_value_and_what_was_expected(override, expected):
    text = complaint("tiny-gpt2", override)
    assert text.startswith(f"load_config: {override.partition('=')[0]}: ") and expected in text
    assert len(text.splitlines()) == 1


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(config.schema())), st.text(max_size=12))
def test_no_text_whatsoever_makes_the_loader_fall_over(key, text):
    try:
        load_config(None, f"{key}={text}")
    except UserError as error:
        assert str(error)


# ---------------------------------------------------------------- unknown keys


UNKNOWN = [
    ("learning_rate=1", "optim.lr"),
    ("lr=1", "optim.lr"),
    ("optim.lrr=1", "optim.lr"),
    ("optim.learning_rate=1", "optim.lr"),
    ("max_iters=1", "train.max_steps"),
    ("batch_size=1", "train.batch_size"),
    ("train.batch_sise=1", "train.batch_size"),
    ("block_size=1", "model.context_length"),
    ("n_embd=1", "model.d_model"),
    ("model.n_embd=1", "model.d_model"),
    ("out_dir=1", "run_dir"),
    ("output_dir=1", "run_dir"),
    ("epochs=1", "train.epochs"),
    ("warmup_steps=1", "optim.warmup_steps"),
    ("weight_decay=1", "optim.weight_decay"),
    ("learnig_rate=1", "optim.lr"),
    ("lora_r=8", "lora.rank"),
    ("lora_alpha=8", "lora.alpha"),
    ("use_peft=true", "finetune.trainable=all"),
    ("device=cpu", "JAX_PLATFORMS"),
    ("precision=bf16", "model.dtype=bfloat16"),
    ("vocab_size=1", "tokenizer.vocab_size or model.vocab_size"),
    ("optim=1", "group of settings"),
    ("qqq=1", "--help"),
]


@pytest.mark.parametrize(("override", "ours"), UNKNOWN, ids=[text for text, _ in UNKNOWN])
def test_an_unknown_key_names_ours(override, ours):
    assert ours in complaint("tiny-gpt2", override)


def test_every_alias_leads_to_a_key():
    from gptjax.config.aliases import ALIASES

    assert set(ALIASES.values()) <= set(config.schema())


def test_all_problems_at_once_with_file_and_line(tmp_path):
    path = write(tmp_path, "x.yaml", "model:\n  n_layr: 2\n  n_head: 5\n  d_model: 32\noptim:\n  lr: fast\n")
    text = complaint(path, "train.accumulation=5")
    assert "x.yaml:2: unknown key model.n_layr; did you mean model.n_layer?" in text
    assert "x.yaml:6: optim.lr: expected a number, got 'fast'" in text
    assert "model.d_model (32) must be divisible by model.n_head (5)" in text and "x.yaml:4" in text
    assert "train.accumulation (5) must divide train.batch_size (12)" in text
    assert len(text.splitlines()) == 4


def test_a_value_that_failed_brings_no_follow_up_complaints():
    assert len(complaint("tiny-gpt2", "model.n_head=x", "model.n_kv_head=3").splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model:\n  n_layer: 2\n n_head: 3\n", "x.yaml:3"),
        ("optim: {lr: 1", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "x.yaml:2: seed is given twice, first in line 1"),
        ("- a\n- b\n", "expected `key: value` lines"),
        ("just words\n", "expected `key: value` lines"),
        ("", "empty"),
        ("# nothing\n", "empty"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("seed: \x01\n", "x.yaml:1: a control character"),
        ("data:\n  source: {a: b}\n", "unknown key data.source.a"),
        ("data:\n  source: [[a]]\n", "flat list"),
        ("optim: 3\n", "group of settings"),
        ("? [a]\n: 1\n", "expected a name"),
        ("base: [a, b]\n", "one preset or file"),
        ("base: nothing-here\n", "no preset"),
        ("seed: !!python/object:os.system 1\n", "means nothing here"),
    ],
)
def test_bad_yaml(tmp_path, text, words):
    assert words in complaint(write(tmp_path, "x.yaml", text))


LAUGHS = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "its aliases stand for"),
        (MERGES, "its aliases stand for"),
        ("a: &a {b: *a}\n", "an alias that stands inside"),
        ("a: &a [*a]\n", "an alias that stands inside"),
        ("".join(" " * i + "a:\n" for i in range(600)), "more than 16 levels"),
        ("".join(" " * i + "a:\n" for i in range(40)), "more than 16 levels"),
        ("data: {source: " + "[" * 2000, "more than 16 levels"),
        ("data: {source: " + "[" * 20 + "]" * 20 + "}", "more than 16 levels"),
        ("{" * 2000, "more than 16 levels"),
        ("<<: 5\n", "not valid YAML: expected a mapping"),
        ("<<: [5]\n", "not valid YAML: expected a mapping"),
        ("".join(f"key{i}: 1\n" for i in range(800)), "more than 500 settings"),
        ("a" * 1000 + ": 1\n", "expected a name before the colon"),
        ("seed: " + "1" * (1 << 18), "more than a config can have"),
        ("train: {batch_size: " + "9" * 400 + "}", "train.batch_size (9"),
        ("train: {batch_size: " + "9" * 9000 + "}", "expected a whole number"),
        ("optim: {lr: " + "9" * 400 + "}", "optim.lr"),
    ],
    ids=range(17),
)
def test_hostile_yaml_is_one_error_within_a_second(tmp_path, text, words):
    path = write(tmp_path, "x.yaml", text)
    start = time.process_time()
    with pytest.raises(UserError) as error:
        load_config(path)
    assert time.process_time() - start < 1.0
    assert words in str(error.value) and len(str(error.value)) < 2000


@pytest.mark.parametrize(
    "setting",
    [
        "data.source=" + "[" * 50_000, "data.source=" + "(" * 50_000, "data.source=[" + "a," * 200_000 + "]",
        "train.batch_size=" + "9" * 400, "train.batch_size=" + "9" * 5000, "optim.lr=" + "9" * 400,
        "train.batch_size=-" + "9" * 400, "data.weights=[" + "9" * 400 + "]", "seed=1e99",
        "model.n_layer=" + "\u0664" * 400,
    ],
    ids=range(10),
)  # fmt: skip
def test_hostile_settings_are_one_error_within_a_second(setting):
    start = time.process_time()
    with pytest.raises(UserError) as error:
        load_config("tiny-gpt2", setting)
    assert time.process_time() - start < 1.0
    assert len(str(error.value)) < 2000


def test_large_numbers_have_a_short_list_of_divisors():
    start = time.process_time()
    text = complaint("tiny-gpt2", "model.n_head=2147483646", "model.n_kv_head=4", "train.batch_size=2147483647",
                     "train.accumulation=2")  # fmt: skip
    assert time.process_time() - start < 1.0 and "must be divisible" in text and "must divide" in text


def test_a_merge_and_an_alias_are_read(tmp_path):
    text = "optim: &o {lr: 1e-2}\nmodel: {n_layer: &n 3, n_head: *n, d_model: 12}\n"
    cfg = load_config(write(tmp_path, "x.yaml", text))
    assert (cfg.optim.lr, cfg.model.n_layer, cfg.model.n_head) == (1e-2, 3, 3)


def test_deep_dicts():
    deep: dict = {"n_layer": 1}
    for _ in range(900):
        deep = {"model": deep}
    with pytest.raises(UserError, match="more than 16 levels"):
        from_dict(deep)


def test_yaml_that_is_not_text(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"seed: \xff\xfe")
    assert "UTF-8" in complaint(path)
    path.write_bytes("seed: 1\n".encode("utf-16"))
    assert "UTF-16 by its byte order mark FF FE" in complaint(path)
    assert "no such config file" in complaint(tmp_path / "absent.yaml")
    assert "did you mean tiny-gpt2?" in complaint("tiny-gpt3")


# ---------------------------------------------------------------- what must hold


IMPOSSIBLE = [
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
    (("train.loggers=[tensorbord]",), "tensorboard, wandb"),
    (("data.weights=[1,2]",), "2 numbers for 1 sources"),
    (("data.weights=[0]",), "must not all be 0"),
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


@pytest.mark.parametrize(("overrides", "words"), IMPOSSIBLE, ids=[" ".join(o) for o, _ in IMPOSSIBLE])
def test_the_impossible_is_refused(overrides, words):
    text = complaint("tiny-gpt2", *overrides)
    assert words in text and "[" in text and "load_config" in text


RULING = [  # (what a file says, what a later layer says, what holds then)
    ("train: {epochs: 2}", ["train.max_steps=7"], {"train.max_steps": 7, "train.epochs": None}),
    ("train: {max_steps: 7}", ["train.epochs=2"], {"train.max_steps": 7, "train.epochs": 2.0}),  # epochs rule
    ("data: {split: document}", ["data.source=a.txt"], {"data.split": "auto", "data.source": ("a.txt",)}),
    ("data: {val_source: b.txt}", ["data.source=a.txt"], {"data.val_source": (), "data.source": ("a.txt",)}),
    ("data: {val_source: b.txt}", ["data.split=tail"], {"data.val_source": (), "data.split": "tail"}),
    ("data: {val_source: b.txt}", ["data.val_fraction=0.2"], {"data.val_source": (), "data.val_fraction": 0.2}),
    ("data: {val_source: b.txt, source: a.txt}", ["seed=1"], {"data.val_source": ("b.txt",)}),
    ("model: {n_layer: 3}", ["pretrain.base=x"], {"model.n_layer": 12, "pretrain.base": "x"}),
    ("tokenizer: {name: gpt2}", ["pretrain.base=x"], {"tokenizer.name": "chars"}),
]


@pytest.mark.parametrize(("file", "later", "holds"), RULING, ids=[f"{file} {later[0]}" for file, later, _ in RULING])
def test_what_a_later_layer_says_wins_over_what_would_rule_it(tmp_path, file, later, holds):
    values = config.flat(load_config(write(tmp_path, "mine.yaml", file + "\n"), *later))
    assert {key: values[key] for key in holds} == holds
    pairs = {(a, b) for a, b in config.RULED}
    assert {pair[0] for pair in pairs} <= {"train.max_steps", "data.source", "data.split", "data.val_fraction"}


NO_EFFECT = [
    ("optim.name=adamw", "optim.momentum=0.9"),
    ("optim.schedule=cosine", "optim.decay_fraction=0.1"),
    ("optim.schedule=constant", "optim.min_lr_ratio=0.1"),
    ("optim.warmup_steps=0", "optim.initial_lr_ratio=0.1"),
    ("prefer.loss=dpo", "prefer.margin=0.5"),
    ("sample.temperature=0", "sample.top_k=5"),
    ("sample.temperature=0", "sample.top_p=0.9"),
    ("sample.temperature=0", "sample.min_p=0.1"),
    ("model.position=learned", "model.rope_base=5000"),
    ("model.sliding_window=0", "model.window_pattern=SL"),
    ("model.init=torch", "model.embed_std=0.1"),
    ("model.qk_norm=false", "model.qk_gain=2"),
    ("data.val_source=b.txt", "data.val_fraction=0.2"),
    ("sample.draft=null", "sample.ahead=2"),
]


@pytest.mark.parametrize(("rules", "asked"), NO_EFFECT, ids=[" ".join(pair) for pair in NO_EFFECT])
def test_a_setting_without_effect_is_refused_where_it_is_asked_for(rules, asked):
    task = ["task=prefer"] if asked.startswith("prefer.") else []
    text = complaint(None, *task, rules, asked)
    assert f"{asked.partition('=')[0]} would have no effect: {rules.partition('=')[0]}=" in text


def test_every_rule_of_settings_without_effect_has_its_case():
    tried = {rules.partition("=")[0] for rules, _ in NO_EFFECT}
    assert {ruling for _, ruling, _ in config.WITHOUT_EFFECT} == tried


def test_every_rule_and_range_is_about_settings_that_are_there():
    named = [keys for keys, _, _ in (*check.MODEL_RULES, *check.RULES) if not callable(keys)]
    assert {key for keys in named for key in keys} <= set(config.schema())
    bounded = [key for key, item in leaf_fields().items() if item.metadata["range"] != NOT_NEGATIVE]
    assert len(bounded) > 60 and all("number" in config.type_name(config.schema()[key]) for key in bounded)


def test_notebook_configs_are_checked_by_the_same_rules():
    cfg = dataclasses.replace(Config(), train=TrainConfig(batch_size=7, accumulation=2))
    with pytest.raises(UserError, match="accumulation .* must divide"):
        validate(cfg)
    with pytest.raises(UserError, match="n_head can be"):
        dataclasses.replace(ModelConfig(), n_head=7)


BY_HAND = [
    (dict(arch="lama"), "model.arch: expected gpt2, llama or modern, got 'lama'"),
    (dict(n_head=5, d_model=32), "must be divisible by model.n_head"),
    (dict(n_layer="2"), "model.n_layer: expected a whole number, got '2'"),
    (dict(n_layer=True), "model.n_layer: expected a whole number, got True"),
    (dict(n_layer=2.0), "model.n_layer: expected a whole number, got 2.0"),
    (dict(n_layer=0), r"model.n_layer \(0\) must be at least 1"),
    (dict(d_model=None), "model.d_model: expected a whole number, got None"),
    (dict(dropout=1.0), "model.dropout"),
    (dict(norm="batch"), "model.norm: expected layernorm or rmsnorm, or null, got 'batch'"),
    (dict(tie_embeddings=1), "model.tie_embeddings: expected true or false"),
    (dict(n_head=4, n_kv_head=3, d_model=32), "must be divisible by model.n_kv_head"),
    (dict(arch="llama", n_head=4, d_model=36), "must be even"),
    (dict(window_pattern="X"), "must be made of S"),
]


@pytest.mark.parametrize(("values", "words"), BY_HAND, ids=[str(values) for values, _ in BY_HAND])
def test_a_model_config_made_by_hand_is_checked(values, words):
    with pytest.raises(UserError, match=words):
        ModelConfig(**values)


def test_what_is_traced_is_not_checked():
    import jax
    import jax.numpy as jnp

    rates = jax.vmap(lambda rate: ModelConfig(dropout=rate).dropout * 2)(jnp.array([0.1, 0.2]))
    assert rates.tolist() == pytest.approx([0.2, 0.4])


def test_replace_derives_anew_what_was_derived():
    small = ModelConfig(n_layer=1, n_head=2, d_model=32)
    assert (small.d_ff, small.n_kv_head) == (128, 2)
    wide = dataclasses.replace(small, d_model=64, n_head=4)
    assert wide == ModelConfig(n_layer=1, n_head=4, d_model=64) and (wide.d_ff, wide.n_kv_head) == (256, 4)
    for arch in ("llama", "modern", "gpt2"):  # again and again
        wide = dataclasses.replace(wide, arch=arch)
        assert wide == ModelConfig(arch=arch, n_layer=1, n_head=4, d_model=64)
    assert hash(wide) == hash(ModelConfig(n_layer=1, n_head=4, d_model=64))


def test_replace_keeps_what_was_given_even_where_it_is_what_would_be_derived():
    explicit = ModelConfig(n_layer=1, n_head=2, d_model=32, d_ff=128, tie_embeddings=True)
    other = dataclasses.replace(explicit, d_model=64, arch="llama")
    assert other.d_ff == 128 and other.tie_embeddings and other.norm == "rmsnorm"
    grouped = dataclasses.replace(ModelConfig(n_head=4, d_model=32), n_head=8, n_kv_head=4)  # 4 was derived before
    assert grouped.n_kv_head == 4
    biased = dataclasses.replace(ModelConfig(), arch="llama", qkv_bias=True)  # as gpt2 had it
    assert biased.qkv_bias and not biased.bias
    assert dataclasses.replace(explicit, d_ff=None, d_model=64).d_ff == 256
    written = from_yaml(to_yaml(Config(model=biased))).model
    assert copy.deepcopy(biased) == pickle.loads(pickle.dumps(biased)) == written == biased
    kept = dataclasses.replace(pickle.loads(pickle.dumps(biased)), arch="gpt2")
    assert kept == dataclasses.replace(ModelConfig(), qkv_bias=True)


def test_a_config_is_found_by_name_and_not_by_value():
    for wrong in ({"optim": {"lr": 1e-3}}, 3, Config()):
        with pytest.raises(UserError, match="expected a preset's name"):
            load_config(wrong)
    with pytest.raises(UserError, match="from_dict"):
        load_config("tiny-gpt2", {"optim.lr": 1e-3})


# ---------------------------------------------------------------- out and back


@pytest.mark.parametrize("name", sorted(config.presets()))
def test_yaml_and_dict_bring_the_same_config_back(name):
    cfg = load_config(name)
    assert from_yaml(to_yaml(cfg)) == cfg
    assert from_yaml(to_yaml(cfg, resolve(name)[1])) == cfg
    assert from_dict(dataclasses.asdict(cfg)) == cfg


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20))
def test_any_prompt_survives_the_yaml(prompt):
    cfg = from_dict({"sample": {"prompt": prompt}})
    assert cfg.sample.prompt == prompt
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        return
    assert from_yaml(to_yaml(cfg)).sample.prompt == prompt


def test_diff_names_what_changed():
    assert diff(load_config("tiny-gpt2"), load_config("tiny-gpt2", "optim.lr=1e-4")) == ["optim.lr: 0.003 -> 0.0001"]
    assert diff(Config(), Config()) == []


def test_every_setting_has_a_sentence_of_help():
    rows = {row[0]: row for _, _, rows in config.describe() for row in rows}
    assert set(rows) == set(config.schema())
    short = [key for key, (_, _, text) in rows.items() if len(text) < 10 or not text.endswith(".")]
    assert not short
    assert rows["train.accumulation"][1:] == (
        "a whole number",
        "Gradient accumulation: micro-batches per step; must divide batch_size.",
    )


def test_a_later_layer_wins_over_what_rules_it(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: classify\ntrain:\n  max_steps: 30\n")
    for cfg in (config.load_config("classify", "train.max_steps=30"), config.load_config(mine)):
        assert (cfg.train.max_steps, cfg.train.epochs) == (30, None)
    assert config.load_config(mine, "train.epochs=2").train.epochs == 2
    assert config.load_config("classify", "train.epochs=2").train.epochs == 2
    cfg = config.load_config("shakespeare-char", "data.source=my.txt")
    assert cfg.data.split == config.DataConfig().split
    assert config.load_config("shakespeare-char", "data.source=my.txt", "data.split=document").data.split == "document"
    assert config.load_config("shakespeare-char", "seed=1").data.split == "document"
    again = config.from_yaml(config.to_yaml(config.load_config("classify")))  # a run's own file says both
    assert again.train.epochs == config.load_config("classify").train.epochs


def test_both_on_one_command_line_are_named():
    text = complaint("classify", "train.max_steps=20", "train.epochs=3")
    assert "train.max_steps=20 and train.epochs=3.0" in text


def test_the_rough_account_of_memory_knows_every_remat():
    from typing import get_args, get_type_hints

    from gptjax.training.memory import memory_bytes

    for remat in get_args(get_type_hints(config.ModelConfig)["remat"]):
        cfg = config.load_config("tiny-gpt2", f"model.remat={remat}", "model.vocab_size=257")
        assert memory_bytes(cfg, 1000, 257)["activations"] > 0


def test_the_styles_are_explained_in_the_help():
    texts = {key: text for _, _, rows in config.describe() for key, _, text in rows}
    assert all("null: chat, else alpaca" in texts[f"{task}.style"] for task in ("instruct", "prefer"))
