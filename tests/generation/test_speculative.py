"""Speculative decoding gives the target model's tokens, however good or bad the draft is."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import forward
from gptjax.errors import UserError
from gptjax.generation import chain, decode, draw, generate, greedy, repetition_penalty, speculate, temperature, top_k
from gptjax.generation import speculative as module
from gptjax.generation.sampling import probabilities
from gptjax.generation.speculative import prompt_lookup

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5]]


@pytest.fixture(scope="module", params=["gpt2", "modern"])
def model(request, tiny):
    return tiny(request.param, context_length=64)


@pytest.fixture(scope="module")
def expected(model):
    cfg, params = model
    return generate(params, PROMPTS, cfg, max_new_tokens=20, key=jax.random.key(0))


@pytest.mark.first_cases(1)
@pytest.mark.parametrize("noise", [0.0, 0.05, 3.0])
def test_the_tokens_are_those_of_greedy_decoding(model, expected, noise):
    cfg, params = model
    draft = jax.tree.map(lambda a: a + noise * jax.random.normal(jax.random.key(a.size), a.shape), params)
    out = speculate(params, draft, PROMPTS, cfg, cfg, max_new_tokens=20)
    assert out.tokens == expected
    if noise == 0:  # all proposals are accepted: five tokens per round after the first token
        assert out.rounds == 4 and out.accepted == 1


@pytest.mark.slow
def test_parameters_stay_as_they_came_where_a_second_layout_has_no_room(model, expected, monkeypatch):
    cfg, params = model
    # simulates a GPU without free memory
    monkeypatch.setattr(decode, "device", SimpleNamespace(platform=lambda: "gpu"))
    monkeypatch.setattr(decode, "_COPIED_BYTES", 0)
    monkeypatch.setattr(module, "for_decoding", lambda params, cfg: pytest.fail("copied into the decoding layout"))
    assert speculate(params, params, PROMPTS, cfg, cfg, max_new_tokens=20).tokens == expected


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("ngram", [1, 3])
def test_proposals_from_the_row_itself_change_no_token(model, expected, ngram):
    cfg, params = model
    prompts = [prompt * 3 for prompt in PROMPTS]
    want = generate(params, prompts, cfg, max_new_tokens=20, key=jax.random.key(0))
    out = speculate(params, None, prompts, cfg, max_new_tokens=20, ngram=ngram)
    assert out.tokens == want and 0 < out.accepted <= 1 and out.rounds < 19


def test_what_was_said_before_is_proposed():
    rows = np.array(
        [
            [1, 2, 3, 9, 1, 2, 3, 0, 0, 0],  # 1 2 3 was followed by 9 1 2
            [5, 6, 7, 5, 6, 7, 5, 0, 0, 0],  # period of three: the continuation is repeated cyclically
            [4, 2, 8, 1, 2, 0, 0, 0, 0, 0],  # only the last token matches
            [1, 2, 3, 4, 0, 0, 0, 0, 0, 0],  # no match: the last token is repeated
            [3, 3, 3, 3, 0, 0, 0, 0, 0, 0],
        ]
    )
    out = prompt_lookup(jnp.asarray(rows), jnp.array([7, 7, 5, 4, 4]), ahead=4, ngram=3)
    assert out.tolist() == [[9, 1, 2, 3], [6, 7, 5, 6], [8, 1, 2, 8], [4, 4, 4, 4], [3, 3, 3, 3]]


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("sampler", [draw, chain(temperature(1.5), top_k(6))], ids=["draw", "filtered"])
@pytest.mark.parametrize("drafted", ["a draft", "the row"])
def test_tokens_have_the_probabilities_of_the_model(tiny, sampler, drafted):
    """4,000 rows: the frequency of each three-token continuation against its exact probability (chi-square, within 5
    standard deviations)."""
    cfg, params = tiny("gpt2", context_length=32, vocab_size=9)
    params = jax.tree.map(lambda a: 0.6 * a, params)
    draft = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    prompt, n, V = [3, 1, 4, 1, 3], 4000, cfg.vocab_size
    ways = [(a, b, c) for a in range(V) for b in range(V) for c in range(V)]
    logits = forward(params, jnp.array([[*prompt, *way] for way in ways]), cfg)
    p = np.asarray(probabilities(sampler)(logits)[:, len(prompt) - 1 : -1], np.float64)
    exact = np.prod([p[np.arange(len(ways)), i, [way[i] for way in ways]] for i in range(3)], 0)
    assert abs(exact.sum() - 1) < 1e-5
    model = (draft, cfg) if drafted == "a draft" else (None, None)
    out = speculate(
        params, model[0], [prompt] * n, cfg, model[1], max_new_tokens=3, ahead=2, sampler=sampler, key=jax.random.key(5)
    )
    assert 0.02 < out.accepted < 0.98
    counts = np.zeros(len(ways))
    np.add.at(counts, [(a * V + b) * V + c for a, b, c in out.tokens], 1)
    assert counts[exact == 0].sum() == 0
    often = exact * n >= 5
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(exact[often], exact[~often].sum()) * n
    keep = expected > 0
    freedom = keep.sum() - 1
    chi2 = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    assert freedom > 20 and abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.slow
@pytest.mark.first_cases(1)
def test_a_smaller_draft_and_a_stop(model, expected, tiny):
    cfg, params = model
    draft_cfg, draft = tiny("gpt2", n_layer=1, context_length=48)
    stop = expected[0][6]
    cut = [row[: row.index(stop)] if stop in row else row for row in expected]
    out = speculate(params, draft, PROMPTS, cfg, draft_cfg, max_new_tokens=20, ahead=3, stop=[stop])
    assert out.tokens == cut and 0 <= out.accepted < 1


@pytest.mark.slow
def test_rows_that_belong_to_no_token(tiny):
    """The model has 17 embedding rows, the draft 20, the tokenizer 6 tokens."""
    cfg, params = tiny("gpt2", context_length=64)
    draft_cfg, draft = tiny("gpt2", n_layer=1, context_length=64, vocab_size=20)
    prompts = [[3, 1, 4], [1, 5]]
    expected = generate(params, prompts, cfg, max_new_tokens=20, key=jax.random.key(0), vocab_size=6)
    assert max(map(max, expected)) < 6
    assert speculate(params, draft, prompts, cfg, draft_cfg, max_new_tokens=20, vocab_size=6).tokens == expected


@pytest.mark.slow
def test_a_draft_with_a_smaller_context_than_the_bucket_of_the_prompt(tiny):
    """A prompt of 49 tokens is padded to 64, which exceeds the draft's context of 60; the request itself fits."""
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
    with pytest.raises(UserError, match=r"make 65 tokens, the context has 64"):
        speculate(params, None, [[1] * 40], cfg, max_new_tokens=20)
    with pytest.raises(UserError, match="draft_cfg: expected the draft's ModelConfig"):
        speculate(params, params, PROMPTS, cfg, max_new_tokens=5)
    with pytest.raises(UserError, match=r"expected a jax.random.key, got None"):
        speculate(params, None, PROMPTS, cfg, max_new_tokens=5, sampler=draw)
    for sampler, why in (
        (chain(repetition_penalty(1.2), pick=greedy), "a repetition penalty"),
        (lambda logits, key: logits.argmax(-1), "its probabilities are not known"),
    ):
        with pytest.raises(UserError, match=why):
            speculate(params, None, PROMPTS, cfg, max_new_tokens=5, sampler=sampler, key=jax.random.key(0))
    with pytest.raises(UserError, match="ahead=0, ngram=3: expected at least 1"):
        speculate(params, None, PROMPTS, cfg, max_new_tokens=5, ahead=0)
    with pytest.raises(UserError, match=r"make 72 tokens, the smaller context has 64"):
        speculate(params, params, PROMPTS, cfg, cfg, max_new_tokens=60)
    assert speculate(params, params, PROMPTS, cfg, cfg, max_new_tokens=0).tokens == [[], [], []]
    classes = dataclasses.replace(cfg, n_classes=2)
    for pair, who in (((classes, cfg), "the model is a classifier"), ((cfg, classes), "the draft is a classifier")):
        with pytest.raises(UserError, match=who):
            speculate(params, params, PROMPTS, *pair, max_new_tokens=5)
