"""The compiled loop against a plain one that reads everything again for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.generation import chain, generate, greedy, temperature
from gptjax.model.gpt import forward
from gptjax.types import UserError

CONTEXT, NEW = 12, 6
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
KEY = jax.random.key(0)


whole = jax.jit(lambda params, tokens, cfg: forward(params, tokens[None], cfg)[0], static_argnums=2)


def plain_loop(cfg, params, prompt, n, context=CONTEXT):
    """Greedy and without a cache. A full context is cut to its last half, and goes on from there."""
    history, window = list(prompt), list(prompt[-context:])
    for _ in range(n):
        padded = np.array(window + [0] * (context - len(window)))  # to the right: the future is not seen
        token = int(whole(params, padded, cfg)[len(window) - 1].argmax())
        history.append(token)
        window = history[-(context // 2) :] if len(window) == context else [*window, token]
    return history[len(prompt) :]


@pytest.fixture(scope="module", params=["gpt2", "modern", "alibi"])
def model(request, tiny):
    arch, position = ("gpt2", "alibi") if request.param == "alibi" else (request.param, None)
    return tiny(arch, position=position, context_length=CONTEXT)


def test_ragged_rows_are_what_each_is_alone(model):
    cfg, params = model
    together = generate(params, PROMPTS, cfg, max_new_tokens=NEW, key=KEY)
    assert together == [plain_loop(cfg, params, prompt, NEW) for prompt in PROMPTS]


def test_past_the_context_it_goes_on_from_the_last_half(model):
    """Twice over; and a prompt longer than the context counts by its end."""
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
    """A sampler of one's own: the last but likeliest token."""
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


def test_several_rows_past_the_context_never_fail(gpt2_model):
    """Rows share their slots, so a short one may be cut sooner than it would be alone; it goes on all the same."""
    cfg, params = gpt2_model
    rows = generate(params, [[1] * 11, [2]], cfg, max_new_tokens=20, key=KEY)
    assert [len(row) for row in rows] == [20, 20]
    assert rows[0] == plain_loop(cfg, params, [1] * 11, 20)
