"""Questions, and the answers that a model gives to them in reward tuning, as batches.

    kept, dropped = questions(conversations, tokenizer, longest=400)
    batch = rollout_batch(prompts, completions, advantages, length=464)

A row holds one answer with its prompt; the answer's end token is only a target:

    tokens        a b c d e . .     prompt "abc", answer "de", where E ends the answer
    targets       b c d e E . .
    weights       0 0 1 1 1 0 0
    old           0 0 x x x 0 0     x: log-probability of the target when it was drawn
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.data.conversations import Conversation, render_all
from gptjax.data.loader import epoch_rows
from gptjax.generation.decode import Completion
from gptjax.tokenizers import Tokenizer


class Question(NamedTuple):
    """The token ids of a prompt, and the conversation, which ends with the expected answer."""

    ids: list[int]
    talk: Conversation


class RolloutBatch(NamedTuple):
    """A batch of B answers of the model, each in a row of T tokens.

    tokens, targets      [B, T] int32
    weights              [B, T] float32: 1 for targets that the model generated (the answer and its end token), else 0
    segment_ids          [B, T] int32: 1, and 0 for padding
    positions            [B, T] int32: 0 to T - 1
    old                  [B, T] float32: log-probability of each target when it was drawn, at the sampling temperature
    reference            [B, T] float32: log-probability of each target under the reference model, or None
    advantages           [B] float32
    """

    tokens: Any
    targets: Any
    weights: Any
    segment_ids: Any
    positions: Any
    old: Any
    reference: Any
    advantages: Any


def questions(
    talks: Sequence[Conversation], tokenizer: Tokenizer, *, longest: int
) -> tuple[list[Question], int]:
    """Returns the questions whose prompt has at most `longest` tokens, and the number of the others.

    The prompt is the conversation before its last answer, in the chat template of the tokenizer.
    """
    rendered = render_all(talks, tokenizer)
    prompts = [[i for span in spans[:-1] for i in span.ids] for spans in rendered]
    kept = [Question(ids, talk) for ids, talk in zip(prompts, talks, strict=True) if 0 < len(ids) <= longest]
    return kept, len(talks) - len(kept)


def draw(n: int, step: int, size: int, seed: int) -> np.ndarray:
    """Returns the indices [size] of the questions of draw number `step`, out of n.

    Every epoch contains each question once, in a new order.
    """
    return epoch_rows(step, size, n, seed)


def rollout_batch(
    prompts: Sequence[Sequence[int]], completions: Sequence[Completion], advantages: np.ndarray, length: int
) -> RolloutBatch:
    """Returns the batch of B answers, without reference log-probabilities.

    Args:
        prompts: token ids of the prompt of each answer.
        completions: the answers with log-probabilities, from `generation.complete`. An answer without an end token was
            cut off; then only its tokens are targets.
        advantages: [B].
        length: the number T of tokens per row; a prompt and its answer must fit.
    """
    n = len(prompts)
    ids = np.zeros((n, length + 1), np.int32)
    old, weights = np.zeros((n, length), np.float32), np.zeros((n, length), np.float32)
    segments = np.zeros((n, length), np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, completions, strict=True)):
        new, logprobs = list(answer.tokens), list(answer.logprobs)
        if answer.end is not None:
            new, logprobs = [*new, answer.end[0]], [*logprobs, answer.end[1]]
        begin, end = len(prompt), len(prompt) + len(new)
        ids[row, :end] = [*prompt, *new]
        old[row, begin - 1 : end - 1] = logprobs
        weights[row, begin - 1 : end - 1] = 1
        segments[row, : end - 1] = 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (n, length))
    return RolloutBatch(
        ids[:, :-1] * segments, ids[:, 1:] * segments, weights, segments, positions, old, None,
        np.asarray(advantages, np.float32),
    )  # fmt: skip


def shapes(rows: int, length: int, reference: bool) -> RolloutBatch:
    """Returns the shapes and dtypes of a batch; `reference`: whether it has reference log-probabilities."""
    ids, floats = (jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (np.int32, np.float32))
    advantages = jax.ShapeDtypeStruct((rows,), np.float32)
    return RolloutBatch(ids, ids, floats, ids, ids, floats, floats if reference else None, advantages)
