"""Builds batches of questions and of the answers that a model samples for the questions in reward tuning.

    kept, dropped = questions(conversations, tokenizer, longest=400)
    batch = rollout_batch([Rollout(prompt, tokens, logprobs), ..], advantages, length=464)

A row of `rollout_batch` holds one prompt with one answer, and a row of `tree_batch` holds one prompt with several
answers. The end token E of an answer is a target, but never an input:

    tokens        a b c d e . .     prompt "abc", answer "deE"
    targets       b c d e E . .
    weights       0 0 1 1 1 0 0
    old           0 0 x x x 0 0     x: log-probability of the target when it was drawn
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gptjax.data import token_tree
from gptjax.data.conversations import Conversation, render_all
from gptjax.data.loader import epoch_rows
from gptjax.data.token_tree import TokenTree
from gptjax.tokenizers import Tokenizer
from gptjax.types import RolloutBatch


class Question(NamedTuple):
    """A question: the token ids of the prompt, and the conversation, which ends with the expected answer."""

    ids: list[int]
    talk: Conversation


class Rollout(NamedTuple):
    """An answer to a prompt as token ids, and the log-probability of each token of the answer when the token was
    sampled.

    If the answer has an end token, the end token is its last token.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    logprobs: Sequence[float]


GroupTree = tuple[TokenTree, list[np.ndarray]]


def questions(talks: Sequence[Conversation], tokenizer: Tokenizer, *, longest: int) -> tuple[list[Question], int]:
    """Returns the questions whose prompt has at most `longest` tokens, and the number of questions that are left out.

    The prompt is the conversation before the last answer, rendered with the chat template of the tokenizer.
    """
    rendered = render_all(talks, tokenizer)
    prompts = [[i for span in spans[:-1] for i in span.ids] for spans in rendered]
    kept = [Question(ids, talk) for ids, talk in zip(prompts, talks, strict=True) if 0 < len(ids) <= longest]
    return kept, len(talks) - len(kept)


def draw(n: int, step: int, size: int, seed: int) -> np.ndarray:
    """Returns the indices [size] of the questions, out of n questions, that draw number `step` selects.

    Every epoch contains each question once, in a random order that changes from epoch to epoch.
    """
    return epoch_rows(step, size, n, seed)


def tree_batch(
    groups: Sequence[Sequence[Rollout]], trees: Sequence[GroupTree], advantages: np.ndarray, length: int, longest: int
) -> RolloutBatch:
    """Returns a batch with one row per group of N rollouts with the same prompt; each row is a token tree that holds
    the prompt of its group once.

    Args:
        groups: B groups; the rollouts of a group have the same prompt.
        trees: `group_tree` of each group.
        advantages: [B, N].
        length: the number T of tokens per row; each tree must fit.
        longest: the number A, at least the length of the longest answer.
    """
    shape = len(groups), len(groups[0]), longest
    index, weights, old = np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    # The array `rows` holds five arrays: tokens, targets, segment_ids, positions and subtree_end.
    rows = np.zeros((5, len(groups), length), np.int32)
    rows[4] = length
    for g, (tree, paths) in enumerate(trees):
        n = len(tree.tokens)
        rows[:, g, :n] = tree.tokens, tree.targets, np.ones(n), tree.positions, tree.subtree_end
        for a, (rollout, path) in enumerate(zip(groups[g], paths, strict=True)):
            size = len(rollout.tokens)
            index[g, a, :size] = path[len(rollout.prompt) - 1 :]
            weights[g, a, :size], old[g, a, :size] = 1, rollout.logprobs
    tokens, targets, segments, positions, ends = rows
    return RolloutBatch(
        tokens, targets, weights, segments, positions, old, None, np.asarray(advantages, np.float32), ends, index
    )


def group_tree(group: Sequence[Rollout]) -> GroupTree:
    """Returns the token tree of rollouts with the same prompt, and the indices in the tree of the tokens of each
    rollout."""
    return token_tree.merge_paths(
        [(np.array([*prompt, *tokens]), np.array([0] * len(prompt) + [1] * len(tokens))) for prompt, tokens, _ in group]
    )


def rollout_batch(rollouts: Sequence[Rollout], advantages: np.ndarray, length: int) -> RolloutBatch:
    """Returns the batch of B rollouts with one rollout per row, without reference log-probabilities.

    Args:
        advantages: [B].
        length: the number T of tokens per row; each prompt with its answer must fit, but for the last token.
    """
    n = len(rollouts)
    ids = np.zeros((n, length + 1), np.int32)
    old, weights = np.zeros((n, length), np.float32), np.zeros((n, length), np.float32)
    segments = np.zeros((n, length), np.int32)
    for row, (prompt, tokens, logprobs) in enumerate(rollouts):
        begin, end = len(prompt) - 1, len(prompt) + len(tokens) - 1
        ids[row, : end + 1] = [*prompt, *tokens]
        old[row, begin:end] = logprobs
        weights[row, begin:end] = 1
        segments[row, :end] = 1
    positions = np.tile(np.arange(length, dtype=np.int32), (n, 1))
    inputs, targets = ids[:, :-1] * segments, ids[:, 1:] * segments
    return RolloutBatch(inputs, targets, weights, segments, positions, old, None, np.asarray(advantages, np.float32))
