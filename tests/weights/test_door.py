"""One door for every place a model can lie in: its tokenizer comes with it."""

import dataclasses

import jax
import pytest

import gptjax
from gptjax import assets, tokenizers, weights
from gptjax.types import UserError

TEXT = "To be, or not to be, that is the question: naïve 日本 12 34\n"


@pytest.fixture(scope="module")
def model():
    tokenizer = tokenizers.train("bpe", [TEXT] * 8, 280)
    cfg = gptjax.ModelConfig(
        arch="llama", n_layer=1, n_head=2, d_model=32, d_ff=32, context_length=16, vocab_size=tokenizer.vocab_size
    )
    return gptjax.init_params(jax.random.key(0), cfg), cfg, tokenizer


@pytest.fixture(scope="module")
def places(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    params, cfg, tokenizer = model
    gptjax.save(folder / "run" / "final", params, cfg, tokenizer)
    weights.export_hf(folder / "hf", params, cfg, tokenizer)
    weights.export_gguf(folder / "m.gguf", params, cfg, tokenizer)
    return folder


@pytest.mark.parametrize("place", ["run", "run/final", "hf", "m.gguf"])
def test_the_tokenizer_of_a_model(model, places, place):
    *_, tokenizer = model
    for load in (weights.load_tokenizer, tokenizers.load):
        found = load(places / place)
        assert found.encode(TEXT) == tokenizer.encode(TEXT)
        assert found.vocab_size == tokenizer.vocab_size
        assert weights.stop_ids(found) == weights.stop_ids(tokenizer)


def test_a_named_asset(model, places, monkeypatch):
    *_, tokenizer = model
    monkeypatch.setitem(assets.ASSETS, "small", assets.ASSETS["smollm2-135m-instruct"])
    monkeypatch.setattr(assets, "fetch", lambda name: places / "m.gguf")
    for load in (weights.load_tokenizer, tokenizers.load):
        assert load("small").encode(TEXT) == tokenizer.encode(TEXT)


def test_a_model_without_one(model, places, tmp_path):
    params, cfg, _ = model
    gptjax.save(tmp_path / "bare", params, cfg)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        weights.load_tokenizer(tmp_path / "bare")
    with pytest.raises(UserError, match="no such run"):
        weights.load_tokenizer(tmp_path / "absent")


def test_windows_are_refused_where_llama_cpp_has_none(model, tmp_path):
    params, cfg, tokenizer = model
    cfg = dataclasses.replace(cfg, sliding_window=4)
    with pytest.raises(UserError, match=r"lacks model\.windows=\(4,\)"):
        weights.export_gguf(tmp_path / "m.gguf", params, cfg, tokenizer)
    assert not (tmp_path / "m.gguf").exists()
