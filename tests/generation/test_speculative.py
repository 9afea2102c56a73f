"""The draft may guess well or badly: the tokens are the large model's own."""

import dataclasses

import jax
import numpy as np
import pytest

from gptjax.generation import generate, speculate
from gptjax.types import UserError

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5]]


@pytest.fixture(scope="module", params=["gpt2", "modern"])
def model(request, tiny):
    return tiny(request.param, context_length=64)


@pytest.fixture(scope="module")
def expected(model):
    cfg, params = model
    return generate(params, PROMPTS, cfg, max_new_tokens=20, key=jax.random.key(0))


@pytest.mark.parametrize("noise", [0.0, 0.05, 3.0])
def test_the_tokens_are_those_of_greedy_decoding(model, expected, noise):
    cfg, params = model
    draft = jax.tree.map(lambda a: a + noise * jax.random.normal(jax.random.key(a.size), a.shape), params)
    out = speculate(params, draft, PROMPTS, cfg, cfg, max_new_tokens=20)
    assert out.tokens == expected
    if noise == 0:  # all proposals stand: five tokens a round after the first token
        assert out.rounds == 4 and out.accepted == 1


def test_a_smaller_draft_and_a_stop(model, expected, tiny):
    cfg, params = model
    draft_cfg, draft = tiny("gpt2", n_layer=1, context_length=48)
    stop = expected[0][6]
    cut = [row[: row.index(stop)] if stop in row else row for row in expected]
    out = speculate(params, draft, PROMPTS, cfg, draft_cfg, max_new_tokens=20, ahead=3, stop=[stop])
    assert out.tokens == cut and 0 <= out.accepted < 1


def test_rows_that_belong_to_no_token(tiny):
    """The model has 17 rows, the draft 20; the tokenizer 6 tokens."""
    cfg, params = tiny("gpt2", context_length=64)
    draft_cfg, draft = tiny("gpt2", n_layer=1, context_length=64, vocab_size=20)
    prompts = [[3, 1, 4], [1, 5]]
    expected = generate(params, prompts, cfg, max_new_tokens=20, key=jax.random.key(0), vocab_size=6)
    assert max(map(max, expected)) < 6
    assert speculate(params, draft, prompts, cfg, draft_cfg, max_new_tokens=20, vocab_size=6).tokens == expected


def test_a_draft_with_a_smaller_context_than_the_bucket_of_the_prompt(tiny):
    """49 tokens are padded to 64 where the context allows; the draft's does not, and all that is asked fits in it."""
    cfg, params = tiny("llama", vocab_size=37, context_length=64)
    draft_cfg, draft = tiny("llama", vocab_size=37, context_length=60, n_layer=1)
    prompt = [i % 37 for i in range(49)]
    wanted = generate(params, [prompt], cfg, max_new_tokens=5, key=jax.random.key(0))
    assert speculate(params, draft, [prompt], cfg, draft_cfg, max_new_tokens=5, ahead=3).tokens == wanted
    for none in ([], np.zeros((0, 3), int)):
        assert speculate(params, draft, none, cfg, draft_cfg, max_new_tokens=5).tokens == []


def test_what_cannot_be(model, tiny):
    cfg, params = model
    other_cfg, other = tiny("gpt2", vocab_size=18)
    with pytest.raises(UserError, match="the draft has 18 tokens, the model 17"):
        speculate(params, other, PROMPTS, cfg, other_cfg, max_new_tokens=5)
    with pytest.raises(UserError, match=r"make 72 tokens, the smaller context has 64"):
        speculate(params, params, PROMPTS, cfg, cfg, max_new_tokens=60)
    assert speculate(params, params, PROMPTS, cfg, cfg, max_new_tokens=0).tokens == [[], [], []]
    classes = dataclasses.replace(cfg, n_classes=2)
    for pair, who in (((classes, cfg), "the model is a classifier"), ((cfg, classes), "the draft is a classifier")):
        with pytest.raises(UserError, match=who):
            speculate(params, params, PROMPTS, *pair, max_new_tokens=5)
