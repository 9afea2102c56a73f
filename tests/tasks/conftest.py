"""The base model and the pairs of the tests of preference tuning and reward models."""

import json

import jax
import pytest

import gptjax

BASE = gptjax.ModelConfig(arch="llama", n_layer=2, n_head=4, d_model=64, d_ff=96, context_length=128, vocab_size=257)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with base, a random model with the tokenizer of bytes, and pairs.jsonl. Other tasks define their own."""
    folder = tmp_path_factory.mktemp("pairs")
    gptjax.save(folder / "base", gptjax.init_params(jax.random.key(0), BASE), BASE, gptjax.tokenizers.load("bytes"))
    rows = [{"prompt": f"say {x}", "chosen": x * 2, "rejected": "no"} for x in "abcdefgh"] * 5
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
