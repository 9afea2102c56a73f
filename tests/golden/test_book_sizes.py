"""Parameter counts of the book's models, GPT-2 and SmolLM2, from shapes alone."""

import dataclasses

import pytest

from gptjax import tree
from gptjax.config import ModelConfig, load_config
from gptjax.model.gpt import abstract_params

# The book's model has an untied head and no biases in q, k and v.
BOOK = ModelConfig(vocab_size=50257, qkv_bias=False, tie_embeddings=False)


def count(cfg, **changes):
    return tree.size(abstract_params(dataclasses.replace(cfg, **changes)))


def sized(n_layer, n_head, d_model, **changes):
    """The book's config with another size; `changes` sets other fields."""
    return dataclasses.replace(
        BOOK, n_layer=n_layer, n_head=n_head, n_kv_head=n_head, d_model=d_model, d_ff=4 * d_model, **changes
    )


@pytest.mark.parametrize(
    ("shape", "untied", "without_head", "megabytes"),
    [
        ((12, 12, 768), 163_009_536, 124_412_160, 621.83),
        ((24, 16, 1024), 406_212_608, 354_749_440, 1549.58),
        ((36, 20, 1280), 838_220_800, 773_891_840, 3197.56),
        ((48, 25, 1600), 1_637_792_000, 1_557_380_800, 6247.68),
    ],
    ids=["small", "medium", "large", "xl"],
)
def test_four_sizes(shape, untied, without_head, megabytes):
    assert count(sized(*shape)) == untied
    assert count(sized(*shape, tie_embeddings=True)) == without_head
    assert round(4 * untied / 2**20, 2) == megabytes


@pytest.mark.parametrize(
    ("shape", "with_bias"),
    [((24, 16, 1024), 406_286_336), ((36, 20, 1280), 838_359_040), ((48, 25, 1600), 1_638_022_400)],
)
def test_sizes_with_bias(shape, with_bias):
    assert count(sized(*shape, qkv_bias=True)) == with_bias


def test_variants_of_the_small_one():
    assert count(BOOK, context_length=256) == 162_419_712
    assert count(BOOK, qkv_bias=True) == 163_037_184
    assert count(BOOK, qkv_bias=True, tie_embeddings=True) == 124_439_808


def test_one_feed_forward_and_one_attention_block():
    blocks = abstract_params(BOOK)["blocks"]
    assert tree.size(blocks["mlp"]) == 12 * 4_722_432
    assert tree.size(blocks["attn"]) == 12 * 2_360_064


@pytest.mark.parametrize(
    ("preset", "vocab_size", "parameters"), [("gpt2-124m", 50257, 124_439_808), ("smollm2-135m", 49152, 134_515_008)]
)
def test_presets(preset, vocab_size, parameters):
    assert count(load_config(preset).model, vocab_size=vocab_size) == parameters
