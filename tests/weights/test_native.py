"""A saved model loads unchanged, or an error names what is wrong."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import tree
from gptjax.errors import UserError

CFG = gptjax.ModelConfig(n_layer=1, n_head=2, d_model=8, context_length=16, vocab_size=11)


@pytest.fixture
def folder(tmp_path):
    return gptjax.save(tmp_path / "model", gptjax.init_params(jax.random.key(0), CFG), CFG)


def test_out_and_in_is_the_same(folder):
    params, cfg = gptjax.load(folder)
    expected = gptjax.init_params(jax.random.key(0), CFG)
    assert cfg == CFG and jax.tree.structure(params) == jax.tree.structure(expected)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, expected)))
    assert not [name for name in os.listdir(folder.parent) if name != "model"]


def test_more_layers_than_tensors(tmp_path):
    """Layers are stacked in one tensor, so the number of layers may exceed the number of tensors."""
    deep = gptjax.ModelConfig(n_layer=40, n_head=2, d_model=8, context_length=16, vocab_size=11)
    gptjax.save(tmp_path / "deep", gptjax.init_params(jax.random.key(0), deep), deep)
    assert gptjax.load(tmp_path / "deep")[1] == deep


def test_names_are_paths(folder):
    from safetensors.numpy import load_file

    assert "blocks/attn/q/kernel" in load_file(folder / "model.safetensors")


def test_bfloat16_survives(tmp_path):
    from safetensors.numpy import load_file

    gptjax.save(tmp_path / "m", {"a": jnp.arange(3, dtype=jnp.bfloat16)}, CFG)
    assert load_file(tmp_path / "m" / "model.safetensors")["a"].dtype == jnp.bfloat16


def test_what_does_not_fit_is_named_all_at_once(tmp_path):
    leaves = tree.flatten(gptjax.init_params(jax.random.key(0), CFG))
    leaves["blocks/attn/q/kernel"] = leaves["blocks/attn/q/kernel"][:, :4]
    leaves["stranger"] = leaves.pop("wte/embedding")
    gptjax.save(tmp_path / "m", tree.unflatten(leaves), CFG)
    with pytest.raises(UserError) as error:
        gptjax.load(tmp_path / "m")
    text = str(error.value)
    assert "wte/embedding is missing, expected shape [11, 8]" in text
    assert "stranger [11, 8] is unknown" in text
    assert "blocks/attn/q/kernel is [1, 4, 8], expected [1, 8, 8]" in text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.json", "{", "model.json cannot be read"),
        ("model.json", "[]", "expected a JSON object"),
        ("model.json", json.dumps({"format": "gptjax model", "version": 9, "model": {}}), "version 9"),
        ("model.json", json.dumps({"format": "gptjax model", "version": 1, "model": {"n_layers": 1}}), "n_layers"),
        ("model.safetensors", "x", "not a whole safetensors file"),
    ],
)
def test_broken_files(folder, name, content, words):
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=words):
        gptjax.load(folder)


def test_no_model_there(tmp_path):
    with pytest.raises(UserError, match="no such run, folder"):
        gptjax.load(tmp_path / "absent")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="the run has checkpoints only"):
        gptjax.load(tmp_path)


def test_replacing_is_all_or_nothing(folder, monkeypatch):
    from gptjax.weights import native

    before = (folder / "model.safetensors").read_bytes()
    other = gptjax.init_params(jax.random.key(1), CFG)
    with monkeypatch.context() as patch:  # simulates a kill between the two renames
        rename = os.rename
        patch.setattr(native.os, "rename", lambda a, b: rename(a, b) if ".partial" not in str(a) else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gptjax.save(folder, other, CFG)
    assert not folder.exists()
    native.recover_folder(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    gptjax.save(folder, other, CFG)
    assert (folder / "model.safetensors").read_bytes() != before
