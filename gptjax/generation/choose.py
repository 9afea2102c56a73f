"""Functions that choose one of several completions of a prompt: by reward, by majority vote, or by log-probability.

    completions = complete(params, [ids], cfg, n=8, logprobs=0, ..)
    texts = [tokenizer.decode(c.tokens) for c in completions]
    best = best_of_n(texts, sequence_rewards(reward_params, reward_cfg, [ids + c.tokens + [end] for c in completions]))
    texts[best.choice], best.score

Each function returns a `Pick`. If several completions are equally good, the first of them is chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.data.conversations import Conversation, render_all
from gptjax.data.split import normalized
from gptjax.errors import UserError
from gptjax.generation.decode import Completion, bucket
from gptjax.losses import class_logits
from gptjax.tokenizers import Tokenizer
from gptjax.types import Params

BATCH_SIZE = 8  # Number of sequences per batch in `sequence_rewards`.


class Pick(NamedTuple):
    """The index of the chosen completion (`choice`), and the score of this completion."""

    choice: int
    score: float


def best_of_n(completions: Sequence[Any], rewards: Sequence[float] | np.ndarray) -> Pick:
    """Chooses the completion with the largest reward (best-of-n sampling). The score of the returned `Pick` is the
    reward of the chosen completion.

    Args:
        completions: the completions of one prompt, of any type.
        rewards: [n], one reward per completion, for example from `reward_scores` or from a verifier.

    Raises:
        UserError: there is no completion, a reward is not a number, or there are not as many rewards as completions.

    Source: arXiv:2112.09332, section 3.2.
    """
    scores = np.asarray(rewards, np.float64)
    if scores.shape != (len(completions),):
        raise UserError(f"rewards: expected one per completion, [{len(completions)}], got shape {list(scores.shape)}")
    return _largest(scores)


def majority(answers: Sequence[str], weights: Sequence[float] | np.ndarray | None = None) -> Pick:
    """Chooses the most frequent answer (self-consistency). With weights, the weights of equal answers are added, and
    the answer with the largest sum is chosen. The score of the returned `Pick` is the fraction of all answers, or of
    the sum of all weights, that belongs to answers equal to the chosen answer.

    The comparison of answers ignores case, differences in whitespace, and final full stops. If the completions contain
    reasoning, pass only their final answers as `answers`.

    Args:
        weights: [n], the weight of each answer, at least 0: for example `jax.nn.softmax` of the rewards of a reward
            model, or the scores of a verifier. None: all are equal.

    Raises:
        UserError: there is no answer, or the weights are not n numbers from 0 with a positive sum.

    Sources: the unweighted majority vote is from arXiv:2203.11171, section 2. The weighted majority vote is the voting
    verifier of arXiv:2206.02336.
    """
    normal = [normalized(answer).rstrip(".") for answer in answers]
    votes = np.ones(len(normal)) if weights is None else np.asarray(weights, np.float64)
    if votes.shape != (len(normal),) or (len(normal) and not (votes.min() >= 0 and 0 < votes.sum() < np.inf)):
        raise UserError(
            f"weights: expected {len(normal)} numbers from 0 with a positive sum, one per answer, got {votes.tolist()}"
        )
    sums: Counter[str] = Counter()
    for answer, vote in zip(normal, votes, strict=True):
        sums[answer] += vote
    return _largest(np.array([sums[answer] / votes.sum() for answer in normal]))


def by_logprob(completions: Sequence[Completion]) -> Pick:
    """Chooses the completion with the largest mean log-probability per token. The score of the returned `Pick` is the
    mean log-probability per token, in nats.

    The completions must have log-probabilities (`complete(.., logprobs=0)`). The log-probability of the stop token is
    not included in the mean log-probability of a completion. A completion without tokens has the score -inf.

    Raises:
        UserError: there is no completion, or completions have no log-probabilities.

    Source: arXiv:2203.11171, eq. 1.
    """
    if any(len(c.logprobs) != len(c.tokens) for c in completions):
        raise UserError("by_logprob: completions without log-probabilities: call complete(.., logprobs=0)")
    return _largest(np.array([np.mean(c.logprobs) if c.logprobs else -np.inf for c in completions]))


def _largest(scores: np.ndarray) -> Pick:
    if not scores.size:
        raise UserError("there are no completions to choose from: expected at least one")
    if np.isnan(scores).any():
        raise UserError(f"the score of completion {int(np.isnan(scores).argmax())} is not a number")
    choice = int(scores.argmax())
    return Pick(choice, float(scores[choice]))


def reward_scores(
    params: Params, cfg: ModelConfig, tokenizer: Tokenizer, conversations: Sequence[Conversation]
) -> np.ndarray:
    """Computes the reward that a reward model gives the last answer of each of n conversations, [n] float32.

    Args:
        params, cfg, tokenizer: the reward model, as `gptjax finetune reward_model` trains it. The conversations are
            rendered with the chat template of the tokenizer, and end with the token that ends an answer.
        conversations: conversations that end with an answer.

    Raises:
        UserError: the model is no reward model, or a conversation cannot be rendered, for a reason that
            `data.conversations.render` lists.
    """
    rendered = render_all(conversations, tokenizer)
    return sequence_rewards(params, cfg, [[i for span in spans for i in span.ids] for spans in rendered])


def sequence_rewards(params: Params, cfg: ModelConfig, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Computes the reward that a reward model gives each of n sequences of token ids, [n] float32.

    The reward of a sequence is the logit of the reward model's only class, computed from the hidden state of the last
    token. Sequences are scored in batches, and the length of a batch is rounded up, so that XLA compiles for few
    shapes. A sequence that is longer than the model's context is truncated from the left.

    Args:
        sequences: the token ids of prompt and answer; after a complete answer, the token that ends it.

    Raises:
        UserError: the model is no reward model, or a sequence is empty.
    """
    refuse_no_reward_model(cfg)
    if any(not len(sequence) for sequence in sequences):
        raise UserError("a sequence to score is empty: expected at least one token")
    rows = [list(sequence)[-cfg.context_length :] for sequence in sequences]
    # batches of sequences with similar lengths need little padding
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    rewards = np.zeros(len(rows), np.float32)
    for first in range(0, len(order), BATCH_SIZE):
        index = order[first : first + BATCH_SIZE]
        width = min(bucket(len(rows[index[-1]])), cfg.context_length)
        tokens, lengths = np.zeros((BATCH_SIZE, width), np.int32), np.ones(BATCH_SIZE, np.int32)
        for place, i in enumerate(index):
            tokens[place, : len(rows[i])], lengths[place] = rows[i], len(rows[i])
        rewards[index] = np.asarray(_rewards(params, tokens, lengths, cfg))[: len(index)]
    return rewards


def refuse_no_reward_model(cfg: ModelConfig, place: str = "") -> None:
    """Raises UserError if the model is not a reward model, which has a classification head of one class. The error
    message begins with `place`, if `place` is given."""
    if cfg.n_classes != 1:
        has = f"a classifier of {cfg.n_classes} classes" if cfg.n_classes else "a language model"
        raise UserError(
            f"{place}{': ' * bool(place)}expected a reward model, which has a head of one class, got {has}: gptjax "
            "finetune reward_model trains a reward model"
        )


@partial(jax.jit, static_argnums=3)
def _rewards(params: Params, tokens: jax.Array, lengths: jax.Array, cfg: ModelConfig) -> jax.Array:
    segment_ids = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
    return class_logits(params, tokens, segment_ids, cfg)[:, 0, 0]
