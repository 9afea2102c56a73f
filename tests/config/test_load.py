"""Loading configs: layers, types, provenance, errors, and writing YAML."""

import dataclasses
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import config
from gptjax.config import Config, diff, from_dict, from_yaml, load_config, resolve, to_yaml
from gptjax.errors import UserError


def test_later_layers_override_and_the_provenance_says_where_values_were_set(write, tmp_path):
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


def test_switches_follow_the_arch_of_the_last_layer():
    assert load_config("tiny-gpt2", "model.arch=llama").model.norm == "rmsnorm"
    assert load_config("tiny-gpt2", "model.arch=llama", "model.norm=layernorm").model.norm == "layernorm"
    assert load_config("tiny-gpt2", "model.norm=null").model.norm == "layernorm"


def test_base_may_be_a_preset_or_a_file_relative_to_its_own(write, tmp_path):
    child = write(tmp_path, "x.yaml", "base: tiny-llama\nseed: 7\n")
    assert (load_config(child).model.n_kv_head, load_config(child).seed) == (1, 7)
    deeper = tmp_path / "deeper"
    deeper.mkdir()
    assert load_config(write(deeper, "y.yaml", "base: ../x.yaml\n")).seed == 7


def test_a_circular_base_is_refused(complaint, write, tmp_path):
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    assert "leads back" in complaint(write(tmp_path, "b.yaml", "base: a.yaml\n"))


def test_the_default_run_dir_is_named_after_the_config(write, tmp_path):
    assert load_config("tiny-gpt2").run_dir == "runs/tiny-gpt2"
    assert load_config(write(tmp_path, "mine.yaml", "seed: 1")).run_dir == "runs/mine"
    assert load_config("tiny-gpt2", "run_dir=elsewhere").run_dir == "elsewhere"


def test_a_run_directory_is_a_config(write, tmp_path):
    write(tmp_path, "config.yaml", to_yaml(load_config("tiny-llama", "seed=5")))
    assert load_config(tmp_path) == load_config("tiny-llama", "seed=5", f"run_dir={tmp_path}")


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
def test_text_is_converted_to_the_type_of_its_setting(override, value):
    key = override.removeprefix("--").partition("=")[0].replace("-", "_")
    loaded = config.flat(load_config("tiny-gpt2", override))[key]
    assert loaded == value and type(loaded) is type(value)


def test_lists_of_numbers():
    assert load_config(None, "data.source=[a,b]", "data.weights=[0.8, 1]").data.weights == (0.8, 1.0)
    assert load_config(None, "data.weights=0.5").data.weights == (0.5,)


def test_values_in_yaml_are_converted_by_the_schema(write, tmp_path):
    text = "optim:\n  lr: 1e-3\nsample: {prompt: on}\ndata:\ntrain.max_steps: 010\n"
    cfg = load_config(write(tmp_path, "x.yaml", text))
    assert (cfg.optim.lr, cfg.sample.prompt, cfg.train.max_steps) == (1e-3, "on", 10)


BAD_TYPES = [
    ("optim.lr=abc", "expected float"),
    ("optim.lr=", "expected float"),
    ("optim.lr=${model.n_layer}", "expected float"),
    ("optim.lr=???", "expected float"),
    ("optim.lr=true", "expected float"),
    ("model.n_layer=six", "expected int"),
    ("model.n_layer=6.5", "expected int"),
    ("model.n_layer=null", "expected int"),
    ("model.arch=gpt3", "gpt2, llama or modern"),
    ("model.norm=${x", "layernorm, rmsnorm or null"),
    ("data.document_mask=2", "true or false"),
    ("data.weights=[1,2", "not closed"),
    ("data.weights=[[1]]", "not a flat list"),
    ("data.weights=[x]", "list of float"),
]


@pytest.mark.parametrize(("override", "expected"), BAD_TYPES, ids=[text for text, _ in BAD_TYPES])
def test_the_error_for_a_wrong_type_names_key_and_expected_type(complaint, override, expected):
    text = complaint("tiny-gpt2", override)
    assert text.startswith(f"load_config: {override.partition('=')[0]}: ") and expected in text
    assert len(text.splitlines()) == 1


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(config.schema())), st.text(max_size=12))
def test_any_text_is_loaded_or_refused_with_a_user_error(key, text):
    try:
        load_config(None, f"{key}={text}")
    except UserError as error:
        assert str(error)


def test_all_problems_are_listed_with_file_and_line(complaint, write, tmp_path):
    path = write(tmp_path, "x.yaml", "model:\n  n_layr: 2\n  n_head: 5\n  d_model: 32\noptim:\n  lr: fast\n")
    text = complaint(path, "train.accumulation=5")
    assert "x.yaml:2: unknown key model.n_layr; did you mean model.n_layer?" in text
    assert "x.yaml:6: optim.lr: expected float, got 'fast'" in text
    assert "model.d_model (32) must be divisible by model.n_head (5)" in text and "x.yaml:4" in text
    assert "train.accumulation (5) must divide train.batch_size (12)" in text
    assert len(text.splitlines()) == 4


def test_an_invalid_value_causes_no_further_complaints(complaint):
    assert len(complaint("tiny-gpt2", "model.n_head=x", "model.n_kv_head=3").splitlines()) == 1


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
def test_malicious_settings_give_an_error_within_a_second(setting):
    start = time.process_time()
    with pytest.raises(UserError) as error:
        load_config("tiny-gpt2", setting)
    assert time.process_time() - start < 1.0
    assert len(str(error.value)) < 2000


OVERRULING = [  # (text of a file, settings of a later layer, expected values)
    ("train: {epochs: 2}", ["train.max_steps=7"], {"train.max_steps": 7, "train.epochs": None}),
    ("train: {max_steps: 7}", ["train.epochs=2"], {"train.max_steps": 7, "train.epochs": 2.0}),
    ("data: {split: document}", ["data.source=a.txt"], {"data.split": "auto", "data.source": ("a.txt",)}),
    ("data: {val_source: b.txt}", ["data.source=a.txt"], {"data.val_source": (), "data.source": ("a.txt",)}),
    ("data: {val_source: b.txt}", ["data.split=tail"], {"data.val_source": (), "data.split": "tail"}),
    ("data: {val_source: b.txt}", ["data.val_fraction=0.2"], {"data.val_source": (), "data.val_fraction": 0.2}),
    ("data: {val_source: b.txt, source: a.txt}", ["seed=1"], {"data.val_source": ("b.txt",)}),
    ("model: {n_layer: 3}", ["pretrain.base=x"], {"model.n_layer": 12, "pretrain.base": "x"}),
    ("tokenizer: {name: gpt2}", ["pretrain.base=x"], {"tokenizer.name": "chars"}),
]


@pytest.mark.parametrize(
    ("file", "later", "expected"), OVERRULING, ids=[f"{file} {later[0]}" for file, later, _ in OVERRULING]
)
def test_a_later_layer_overrules_settings_that_would_take_precedence(write, tmp_path, file, later, expected):
    values = config.flat(load_config(write(tmp_path, "mine.yaml", file + "\n"), *later))
    assert {key: values[key] for key in expected} == expected
    pairs = {(a, b) for a, b in config.RULED}
    assert {pair[0] for pair in pairs} <= {"train.max_steps", "data.source", "data.split", "data.val_fraction"}


def test_load_config_refuses_other_types():
    for wrong in ({"optim": {"lr": 1e-3}}, 3, Config()):
        with pytest.raises(UserError, match="expected a preset's name"):
            load_config(wrong)
    with pytest.raises(UserError, match="from_dict"):
        load_config("tiny-gpt2", {"optim.lr": 1e-3})


@pytest.mark.parametrize("name", sorted(config.presets()))
def test_a_config_survives_yaml_and_dict(name):
    cfg = load_config(name)
    assert from_yaml(to_yaml(cfg)) == cfg
    assert from_yaml(to_yaml(cfg, resolve(name)[1])) == cfg
    assert from_dict(dataclasses.asdict(cfg)) == cfg


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20))
def test_any_prompt_survives_yaml(prompt):
    cfg = from_dict({"sample": {"prompt": prompt}})
    assert cfg.sample.prompt == prompt
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        return
    assert from_yaml(to_yaml(cfg)).sample.prompt == prompt


def test_diff_lists_changed_settings():
    assert diff(load_config("tiny-gpt2"), load_config("tiny-gpt2", "optim.lr=1e-4")) == ["optim.lr: 0.003 -> 0.0001"]
    assert diff(Config(), Config()) == []


def test_a_later_layer_overrules_its_base_and_preset(tmp_path):
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
    reloaded = config.from_yaml(config.to_yaml(config.load_config("classify")))  # a run's config.yaml sets both
    assert reloaded.train.epochs == config.load_config("classify").train.epochs


def test_max_steps_and_epochs_on_one_command_line_are_refused(complaint):
    text = complaint("classify", "train.max_steps=20", "train.epochs=3")
    assert "train.max_steps=20 and train.epochs=3.0" in text
