"""The schema: configs as static arguments, `dataclasses.replace`, and help texts."""

import copy
import dataclasses
import pickle

from gptjax import config
from gptjax.config import Config, ModelConfig, from_yaml, load_config, to_yaml


def test_a_model_config_is_a_static_argument():
    assert hash(load_config("tiny-gpt2")) == hash(load_config("tiny-gpt2"))
    assert dataclasses.replace(ModelConfig(), n_layer=3).n_layer == 3


def test_replace_derives_values_again():
    small = ModelConfig(n_layer=1, n_head=2, d_model=32)
    assert (small.d_ff, small.n_kv_head) == (128, 2)
    wide = dataclasses.replace(small, d_model=64, n_head=4)
    assert wide == ModelConfig(n_layer=1, n_head=4, d_model=64) and (wide.d_ff, wide.n_kv_head) == (256, 4)
    for arch in ("llama", "modern", "gpt2"):
        wide = dataclasses.replace(wide, arch=arch)
        assert wide == ModelConfig(arch=arch, n_layer=1, n_head=4, d_model=64)
    assert hash(wide) == hash(ModelConfig(n_layer=1, n_head=4, d_model=64))


def test_replace_keeps_values_that_were_given():
    """Also if they equal the derived values."""
    explicit = ModelConfig(n_layer=1, n_head=2, d_model=32, d_ff=128, tie_embeddings=True)
    other = dataclasses.replace(explicit, d_model=64, arch="llama")
    assert other.d_ff == 128 and other.tie_embeddings and other.norm == "rmsnorm"
    grouped = dataclasses.replace(ModelConfig(n_head=4, d_model=32), n_head=8, n_kv_head=4)  # n_kv_head is now given
    assert grouped.n_kv_head == 4
    biased = dataclasses.replace(ModelConfig(), arch="llama", qkv_bias=True)  # equals the default of gpt2
    assert biased.qkv_bias and not biased.bias
    assert dataclasses.replace(explicit, d_ff=None, d_model=64).d_ff == 256
    written = from_yaml(to_yaml(Config(model=biased))).model
    assert copy.deepcopy(biased) == pickle.loads(pickle.dumps(biased)) == written == biased
    kept = dataclasses.replace(pickle.loads(pickle.dumps(biased)), arch="gpt2")
    assert kept == dataclasses.replace(ModelConfig(), qkv_bias=True)


def test_every_setting_has_a_help_text():
    rows = {row[0]: row for _, _, rows in config.describe() for row in rows}
    assert set(rows) == set(config.schema())
    short = [key for key, (_, _, text) in rows.items() if len(text) < 10 or not text.endswith(".")]
    assert not short
    assert rows["train.accumulation"][1:] == (
        "int",
        "Gradient accumulation: number of micro-batches per optimizer step; must divide batch_size.",
    )


def test_the_help_explains_prompt_styles():
    texts = {key: text for _, _, rows in config.describe() for key, _, text in rows}
    for task in ("instruct", "prefer", "reward_model"):
        assert "null: chat if the model has a template, else alpaca" in texts[f"{task}.style"]
