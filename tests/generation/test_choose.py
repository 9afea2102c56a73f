"""Best-of-n, majority and mean log-probability, and the scores of a reward model."""

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import UserError, tokenizers
from gptjax.data.conversations import Conversation, render
from gptjax.generation import Completion, best_of_n, by_logprob, majority, reward_scores, sequence_rewards
from gptjax.losses import class_logits
from gptjax.tokenizers.chat import styled


def completion(*logprobs):
    return Completion([1] * len(logprobs), list(logprobs), [], "stop")


def test_the_largest_reward_wins_and_the_first_of_equals():
    assert best_of_n("abc", [0.5, 2.0, -1.0]) == (1, 2.0)
    assert best_of_n("abc", np.float32([1, 3, 3])) == (1, 3.0)
    assert best_of_n("abc", jnp.array([-2, -np.inf, -3.0])) == (0, -2.0)


def test_the_most_frequent_answer_wins_and_the_first_of_equals():
    assert majority(["7", "12", " 12.", "7 ", "12"]) == (1, 0.6)
    assert majority(["b", "a", "A", "B."]) == (0, 0.5)
    assert majority(["An  apple", "pear", "an apple."]) == (0, 2 / 3)
    assert majority(["x"]) == (0, 1.0)


def test_the_largest_sum_of_weights_wins():
    answers = ["7", "12", " 12.", "7 ", "12"]
    assert majority(answers, [1] * 5) == majority(answers)
    assert majority(answers, [3, 1, 1, 3, 0]) == (0, 0.75)
    assert majority(answers, np.float32([0.5, 2, 0, 0.5, 1])) == (1, 0.75)
    assert majority(["a", "b"], [0, 2.0]) == (1, 1.0)


def test_the_mean_logprob_does_not_depend_on_the_length():
    short, long = completion(-1.0, -2.0), completion(*[-1.4] * 10)
    assert by_logprob([short, long]) == (1, pytest.approx(-1.4))
    assert by_logprob([short, short]) == (0, -1.5)
    assert by_logprob([completion(), short]) == (1, -1.5)  # without a token there is no mean


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda: best_of_n("abc", [1.0, 2.0]), r"expected one per completion, \[3\], got shape \[2\]"),
        (lambda: best_of_n("abc", [[1.0, 2.0, 3.0]]), r"got shape \[1, 3\]"),
        (lambda: best_of_n("ab", [1.0, np.nan]), "completion 1 is not a number"),
        (lambda: best_of_n([], []), "no completions"),
        (lambda: majority([]), "no completions"),
        (lambda: majority([], []), "no completions"),
        (lambda: majority(["a", "b"], [1]), r"weights: expected 2 numbers from 0 .* got \[1.0\]"),
        (lambda: majority(["a", "b"], [1, -1]), "with a positive sum"),
        (lambda: majority(["a", "b"], [0, 0]), "with a positive sum"),
        (lambda: majority(["a", "b"], [np.nan, 1]), "with a positive sum"),
        (lambda: by_logprob([]), "no completions"),
        (lambda: by_logprob([Completion([1, 2], [], [], "stop")]), r"complete\(.., logprobs=0\)"),
    ],
)
def test_what_cannot_be_chosen(choose, message):
    with pytest.raises(UserError, match=message):
        choose()


@pytest.fixture(scope="module")
def judge(tiny):
    return tiny("llama", n_classes=1, cls_bias=False, vocab_size=257, context_length=64)


@pytest.mark.slow
def test_the_reward_is_the_logit_at_the_last_token(judge):
    """Rows of one batch, of different lengths and in any order, get the rewards that they get alone."""
    cfg, params = judge
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 257, n).tolist() for n in (5, 1, 30, 64, 7, 2, 16, 17, 40, 3)]
    ids = [jnp.array([row]) for row in rows]
    want = [class_logits(params, row, jnp.ones_like(row), cfg)[0, 0, 0] for row in ids]
    got = sequence_rewards(params, cfg, rows)
    assert got.dtype == np.float32 and got.shape == (10,)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(sequence_rewards(params, cfg, rows[::-1])[::-1], got, atol=1e-5)
    longer = [[9, *rows[3]]]  # beyond the context of 64 tokens
    np.testing.assert_array_equal(sequence_rewards(params, cfg, longer), sequence_rewards(params, cfg, rows[3:4]))
    assert sequence_rewards(params, cfg, []).shape == (0,)


def test_conversations_are_scored_up_to_the_end_of_the_answer(judge):
    cfg, params = judge
    tokenizer = styled(tokenizers.load("bytes"), "alpaca")
    talk = Conversation(({"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}), "here")
    ids = [i for span in render(talk, tokenizer) for i in span.ids]
    assert ids[-1] == tokenizer.eot_id
    np.testing.assert_array_equal(
        reward_scores(params, cfg, tokenizer, [talk, talk]), sequence_rewards(params, cfg, [ids, ids])
    )


def test_only_a_reward_model_scores(judge, tiny):
    for n, words in ((0, "got a language model"), (3, "got a classifier of 3 classes")):
        cfg, params = tiny("llama", n_classes=n)
        with pytest.raises(UserError, match=words):
            sequence_rewards(params, cfg, [[1]])
    cfg, params = judge
    with pytest.raises(UserError, match="is empty"):
        sequence_rewards(params, cfg, [[1], []])
