"""The compiled decoding loop against a plain loop that recomputes all tokens at every step, without a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.generation import (
    chain,
    complete,
    generate,
    greedy,
    programs,
    repetition_penalty,
    stream,
    temperature,
)
from gptjax.generation.decode import bucket
from gptjax.model.gpt import forward

CONTEXT, NEW = 12, 6
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
KEY = jax.random.key(0)


whole = jax.jit(lambda params, tokens, cfg: forward(params, tokens[None], cfg)[0], static_argnums=2)


def plain_loop(cfg, params, prompt, n, context=CONTEXT):
    """Greedy decoding without a cache. When the context is full, only its last half is kept."""
    history, window = list(prompt), list(prompt[-context:])
    for _ in range(n):
        padded = np.array(window + [0] * (context - len(window)))  # padded on the right, which causal attention ignores
        token = int(whole(params, padded, cfg)[len(window) - 1].argmax())
        history.append(token)
        window = history[-(context // 2) :] if len(window) == context else [*window, token]
    return history[len(prompt) :]


@pytest.fixture(scope="module", params=["gpt2", "modern", "alibi"])
def model(request, tiny):
    arch, position = ("gpt2", "alibi") if request.param == "alibi" else (request.param, None)
    return tiny(arch, position=position, context_length=CONTEXT)


@pytest.mark.first_cases(1)
def test_ragged_rows_are_what_each_is_alone(model):
    cfg, params = model
    batched = generate(params, PROMPTS, cfg, max_new_tokens=NEW, key=KEY)
    assert batched == [plain_loop(cfg, params, prompt, NEW) for prompt in PROMPTS]


@pytest.mark.slow
@pytest.mark.first_cases(1)
def test_past_the_context_it_goes_on_from_the_last_half(model):
    """The context fills up twice; of a prompt longer than the context the last tokens are used."""
    cfg, params = model
    out = generate(params, [PROMPTS[1]], cfg, max_new_tokens=20, key=KEY)
    assert out == [plain_loop(cfg, params, PROMPTS[1], 20)]
    long = list(np.random.default_rng(0).integers(0, 17, 15))
    assert generate(params, [long], cfg, max_new_tokens=4, key=KEY) == [plain_loop(cfg, params, long, 4)]


@pytest.fixture(scope="module")
def gpt2_model(tiny):
    return tiny("gpt2", context_length=CONTEXT)


def test_stop_tokens_end_a_row_and_are_not_given_back(gpt2_model):
    cfg, params = gpt2_model
    full = generate(params, PROMPTS, cfg, max_new_tokens=NEW, key=KEY)
    stop = (full[0][2], 16)
    expected = [row[: next((i for i, t in enumerate(row) if t in stop), NEW)] for row in full]
    assert generate(params, PROMPTS, cfg, max_new_tokens=NEW, key=KEY, stop=stop) == expected
    assert len(expected[0]) <= 2


def test_a_sampler_draws_the_same_with_the_same_key(gpt2_model):
    cfg, params = gpt2_model
    sampler = chain(temperature(3.0))
    a, b, c = (
        generate(params, PROMPTS, cfg, max_new_tokens=NEW, key=jax.random.key(seed), sampler=sampler)
        for seed in (0, 0, 1)
    )
    assert a == b != c
    assert all(len(row) == NEW for row in a)


def test_rows_with_the_same_prompt_draw_apart(gpt2_model):
    cfg, params = gpt2_model
    rows = generate(params, [[1, 2]] * 3, cfg, max_new_tokens=NEW, key=KEY, sampler=chain(temperature(3.0)))
    assert len({tuple(row) for row in rows}) == 3


def test_the_sampler_sees_the_models_logits(gpt2_model):
    """With a custom sampler that picks the second most likely token."""
    cfg, params = gpt2_model

    def second(logits, key):
        return jnp.argsort(logits, axis=-1)[:, -2]

    out = generate(params, [PROMPTS[0]], cfg, max_new_tokens=1, key=KEY, sampler=second)
    logits = whole(params, np.array(PROMPTS[0] + [0] * 9), cfg)[2]
    assert out == [[int(np.argsort(logits)[-2])]]


def test_nothing_to_do(gpt2_model):
    cfg, params = gpt2_model
    assert generate(params, PROMPTS, cfg, max_new_tokens=0, key=KEY) == [[], [], []]
    assert generate(params, [], cfg, max_new_tokens=5, key=KEY) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[1], []], "prompt 1 is empty"), ([[1, 17]], r"prompt 0 has ids outside 0\.\.16: \[17\]"), ([[-1]], r"\[-1\]")],
)
def test_prompts_that_cannot_be_read(gpt2_model, prompts, message):
    cfg, params = gpt2_model
    with pytest.raises(UserError, match=message):
        generate(params, prompts, cfg, max_new_tokens=1, key=KEY, sampler=greedy)


def test_every_row_meets_the_end_of_its_context_by_itself(gpt2_model):
    cfg, params = gpt2_model
    prompts = [[1] * 11, [2], [3, 4, 5, 6, 7]]
    rows = generate(params, prompts, cfg, max_new_tokens=20, key=KEY)
    assert rows == [plain_loop(cfg, params, prompt, 20) for prompt in prompts]


@pytest.mark.slow
@pytest.mark.first_cases(1)
def test_a_stream_gives_what_generate_gives(model):
    cfg, params = model
    whole = generate(params, [PROMPTS[0]], cfg, max_new_tokens=17, key=KEY)[0]
    chunks = list(stream(params, PROMPTS[0], cfg, max_new_tokens=17, key=KEY, every=5))
    assert [t for chunk in chunks for t in chunk] == whole and [len(chunk) for chunk in chunks] == [5, 5, 5, 2]
    first = whole.index(whole[7])
    cut = stream(params, PROMPTS[0], cfg, max_new_tokens=17, key=KEY, stop=[whole[7]])
    assert [t for chunk in cut for t in chunk] == whole[:first]


def test_log_probabilities_are_the_models(gpt2_model):
    cfg, params = gpt2_model
    prompt = PROMPTS[1]
    out = complete(params, [prompt], cfg, max_new_tokens=4, key=KEY, logprobs=3, sampler=chain(temperature(2.0)))[0]
    tokens = prompt + out.tokens
    logp = jax.nn.log_softmax(whole(params, np.array(tokens + [0] * (CONTEXT - len(tokens))), cfg))
    for i, (token, value, top) in enumerate(zip(out.tokens, out.logprobs, out.top, strict=True)):
        row = logp[len(prompt) - 1 + i]
        assert value == pytest.approx(float(row[token]), abs=1e-4)
        likeliest = np.argsort(-row)[:3]
        assert [t for t, _ in top] == likeliest.tolist()
        np.testing.assert_allclose([v for _, v in top], row[likeliest], atol=1e-4)


def test_several_samples_of_a_prompt_and_why_they_ended(gpt2_model):
    cfg, params = gpt2_model
    rows = complete(params, PROMPTS, cfg, max_new_tokens=5, key=KEY, n=2)
    greedy_rows = generate(params, PROMPTS, cfg, max_new_tokens=5, key=KEY)
    assert [row.tokens for row in rows] == [row for row in greedy_rows for _ in range(2)]
    assert {row.finish for row in rows} == {"length"}
    stop = [greedy_rows[0][2]]
    assert complete(params, PROMPTS[:1], cfg, max_new_tokens=5, key=KEY, stop=stop)[0].finish == "stop"


def test_repetition_is_held_down(gpt2_model):
    """With a very large penalty no token is repeated, including the tokens of the prompt."""
    cfg, params = gpt2_model
    sampler = chain(repetition_penalty(1e6), pick=greedy)
    rows = generate(params, PROMPTS, cfg, max_new_tokens=6, key=KEY, sampler=sampler)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        seen = prompt + row
        assert len(set(seen)) == len(set(prompt)) + len(row)


@pytest.mark.slow
def test_an_int8_cache_is_close(gpt2_model):
    cfg, params = gpt2_model
    exact, rough = (
        complete(params, PROMPTS, cfg, max_new_tokens=4, key=KEY, logprobs=0, cache_dtype=dtype)
        for dtype in ("float32", "int8")
    )
    for a, b in zip(exact, rough, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=0.05)


def test_other_lengths_find_the_compiled_programs(tiny):
    cfg, params = tiny("gpt2", context_length=128)
    rng = np.random.default_rng(0)

    def run(size, new):
        generate(params, [rng.integers(0, 17, size).tolist()], cfg, max_new_tokens=new, key=KEY)

    run(20, 12)
    before = programs()
    for i in range(50):
        run(17 + i % 8, 1 + i % 16)  # all lengths fall into the buckets 24 and 16
    assert programs() == before
    run(25, 12)
    assert programs() == before + 1  # one more prefill program, the same decoding loop


def test_buckets():
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 49, 65, 97, 1000)] == [16, 16, 24, 24, 32, 48, 64, 96, 128, 1024]


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("sampler", [greedy, chain(temperature(3.0)), chain(repetition_penalty(1.5), temperature(3.0))])
def test_rows_that_belong_to_no_token_are_never_drawn(model, sampler):
    """5 tokens in the tokenizer, 17 embedding rows in the model; log-probabilities are still over all 17."""
    cfg, params = model
    settings = dict(max_new_tokens=24, key=KEY, sampler=sampler, vocab_size=5)
    done = complete(params, PROMPTS, cfg, n=2, logprobs=8, **settings)
    assert max(max(row.tokens) for row in done) < 5
    assert all(len(top) == 5 and max(i for i, _ in top) < 5 for row in done for top in row.top)
    assert all(sum(np.exp([p for _, p in top])) < 0.999 for row in done for top in row.top)
    assert [t for chunk in stream(params, PROMPTS[0], cfg, **settings) for t in chunk] == generate(
        params, PROMPTS[:1], cfg, **settings
    )[0]
    with pytest.raises(UserError, match="vocab_size=0"):
        generate(params, PROMPTS, cfg, max_new_tokens=1, key=KEY, vocab_size=0)


def test_a_classifier_does_not_write(gpt2_model):
    cfg, params = gpt2_model
    classes = dataclasses.replace(cfg, n_classes=2)
    for write in (generate, complete, lambda p, prompts, *rest, **more: list(stream(p, prompts[0], *rest, **more))):
        with pytest.raises(UserError, match=r"classifier of 2 classes, which does not write: gptjax classify RUN"):
            write(params, [[1, 2]], classes, max_new_tokens=2, key=jax.random.key(0))
