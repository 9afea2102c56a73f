"""Gemma 3 text models: windows and attention scales in GGUF files, and the token without an embedding."""

import dataclasses
import json

import jax
import pytest

import gptjax
from gptjax import tokenizers, weights
from gptjax.errors import UserError
from gptjax.tokenizers import hf
from gptjax.weights import gguf
from gptjax.weights.families.gemma3 import IMAGE

TEXT = "To be, or not to be, that is the question: naïve 日本 12 34\n"
GEMMA = gptjax.ModelConfig(
    arch="llama", qk_norm=True, norm_position="both", activation="geglu", sliding_window=4, window_pattern="SSSSSL",
    rope_base=1e6, rope_local_base=1e4, embed_gain=32**0.5, n_layer=6, n_head=2, d_model=32, d_ff=32, context_length=16,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        ({}, None),
        ({"sliding_window": 0}, None),
        ({"sliding_window": 64}, None),
        ({"window_pattern": "SL"}, "model.windows=(4, 0, 4, 0, 4, 0)"),
        ({"window_pattern": "S", "sliding_window": 64}, "model.windows=(64, 64, 64, 64, 64, 64)"),  # another RoPE base
        ({"rope_local_base": 500.0}, "model.rope_local_base=500.0"),
        ({"attention_scale": 0.1}, "model.attention_scale="),
    ],
)
def test_windows_as_gemma_has_them(change, lacks):
    cfg = dataclasses.replace(GEMMA, **change)
    if lacks is None:
        assert gguf.family_of(cfg) == "gemma3"
        return
    with pytest.raises(UserError) as error:
        gguf.family_of(cfg)
    assert lacks in str(error.value)


def test_the_scale_that_llama_cpp_gives_to_62_layers_of_gemma():
    metadata = gguf.to_metadata(dataclasses.replace(GEMMA, n_layer=62, d_head=8), "gemma3")
    assert gguf.from_metadata(metadata, {}, "m.gguf").attention_scale == 16**-0.5


def test_the_images_of_gemma_have_no_row_in_its_text_models(tmp_path):
    """The text models are published with the multimodal tokenizer, whose image token has no embedding in them; in other
    families such a token is an error."""
    data = json.loads(hf.to_hf(tokenizers.train("bpe", [TEXT] * 8, 280))["tokenizer.json"])
    data["model"]["byte_fallback"] = True  # needs the `tokenizers` library, like Gemma's tokenizer
    plain = hf.from_hf(json.dumps(data))
    rows = plain.vocab_size
    cfg = dataclasses.replace(GEMMA, vocab_size=rows, tie_embeddings=True)
    params = gptjax.init_params(jax.random.key(0), cfg)
    for name, fits in ((IMAGE, True), ("<more>", False)):
        folder = weights.export_hf(tmp_path / name, params, cfg, plain)
        data["added_tokens"].append(hf.added_token(name, rows, True))
        (folder / "tokenizer.json").write_text(json.dumps(data))
        data["added_tokens"].pop()
        if not fits:
            with pytest.raises(UserError, match=f"has {rows + 1} ids, the model {rows} rows"):
                weights.load_tokenizer(folder)
            continue
        tokenizer = weights.load_tokenizer(folder)
        assert tokenizer.kind == "hf" and tokenizer == tokenizers.loads(plain.dumps()).replace(
            eos_ids=tokenizer.eos_ids
        )
        assert max(tokenizer.encode(f"To be {name}")) < rows and tokenizer.decode(tokenizer.encode(name)) == name
        gptjax.save(tmp_path / "own", params, cfg, tokenizer)
        assert weights.load_tokenizer(tmp_path / "own") == tokenizer
