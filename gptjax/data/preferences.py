"""Pairs of answers to one question, of which one is preferred, as rows of one length.

    pairs = read("preferences.jsonl")                 {"prompt": .., "chosen": .., "rejected": ..}
    rows_ = rows(encode(pairs, tok, context_length=256), 256)
    batch(rows_, 7, batch_size=4, seed=0)

The two sides of a pair stand side by side in one row, each a segment that sees nothing of the other:

    tokens        a b c a b d   e f g h e f h .       pair 0: "ab" with the answers "cE" or "dE"
    segment_ids   1 1 1 2 2 2   3 3 3 3 4 4 4 0       2 p + 1: chosen of pair p; 2 p + 2: rejected
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.data import conversations, loader, packing, synthetic
from gptjax.data.conversations import Conversation, Formats, Parse, Parsed
from gptjax.errors import UserError
from gptjax.formats.tables import Record
from gptjax.tokenizers.base import Tokenizer
from gptjax.tokenizers.chat import Style

SIDES = ("chosen", "rejected")


class Pair(NamedTuple):
    """The same conversation but for its last answer."""

    chosen: Conversation
    rejected: Conversation


Example = tuple[np.ndarray, np.ndarray]  # ids, and weights: 1 on the last answer and its end


class EncodedPairs(NamedTuple):
    """sides[i]: those of chosen and of rejected."""

    sides: list[tuple[Example, Example]]
    dropped: int  # pairs that did not fit


class PairRows(NamedTuple):
    """As `packing.Rows`, [n, T], and pairs [n, P] int32: which pair stands in a place, -1 for none."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segment_ids: np.ndarray
    pairs: np.ndarray


class PairBatch(NamedTuple):
    """tokens, targets, segment_ids [B, T] int32, weights [B, T] float32; present [B, P] float32, 0 where there is no
    pair; reference [B, P, 2] float32: log-probabilities of chosen and rejected before training, 0 if none are needed.
    """

    tokens: Any
    targets: Any
    weights: Any
    segment_ids: Any
    present: Any
    reference: Any


# --- reading


def _sides(prompt: str, extra: str = "") -> Parse:
    """Answers to a question. Both are texts, or both lists of messages: the answer alone, or the prompt before it."""

    def parse(record: Record) -> tuple[Parsed, ...]:
        if any(isinstance(record[side], list) for side in SIDES):
            return tuple(_after(prompt, record, side) for side in SIDES)
        if isinstance(record[prompt], list):
            asked = conversations.turns(prompt)(record)
            if isinstance(asked, str):
                return (asked,)
        else:
            user = {"role": "user", "content": record[prompt]}
            if extra and record.get(extra) not in ("", None):
                user["input"] = record[extra]
            asked = [(prompt, user)]
        return tuple([*asked, (side, {"role": "assistant", "content": record[side]})] for side in SIDES)

    return parse


def _after(prompt: str, record: Record, side: str) -> Parsed:
    """The messages of a side with those of the prompt before them, which may stand there already."""
    answered = conversations.turns(side)(record)
    if isinstance(answered, str) or not answered:
        return answered
    as_text = not isinstance(record[prompt], list)
    asked = [(prompt, {"role": "user", "content": record[prompt]})] if as_text else conversations.turns(prompt)(record)
    if isinstance(asked, str):
        return asked
    said = [_said(message) for _, message in answered]
    if said[: len(asked)] == [_said(message) for _, message in asked]:
        return answered
    if said[0][0] == "assistant":
        return [*asked, *answered]
    if as_text and ("user", record[prompt]) in said:  # of several turns, the one that is asked last
        return answered
    return (
        f"{side}: expected messages that begin with those of {prompt}, or the answer of role assistant alone; found "
        f"role {said[0][0]!r:.40} with other content first"
    )


def _said(message: dict[str, Any]) -> tuple[Any, Any]:
    return message["role"], message["content"]


FORMATS: Formats = {
    ("prompt", *SIDES): (
        '{"prompt": .., "chosen": .., "rejected": ..}, texts or lists of messages',
        _sides("prompt"),
    ),
    ("instruction", *SIDES): (
        '{"instruction": .., "input": .. (optional), "chosen": .., "rejected": ..}',
        _sides("instruction", "input"),
    ),
    SIDES: (
        '{"chosen": [{"role": .., "content": ..}, ..], "rejected": [..]}',
        lambda record: tuple(conversations.turns(side)(record) for side in SIDES),
    ),
}


def read(source: str, notes: list[str] | None = None) -> list[Pair]:
    """The pairs of a .json (array), .jsonl, .parquet or .csv file, or of hf:org/name[:config][@split].

    Args:
        notes: as of `conversations.read`, which says what is read beside the keys of `FORMATS`.

    Raises:
        UserError: as of `conversations.read`; pairs with two questions, or the same answer twice: the first 20.
    """
    pairs = [Pair(*sides) for sides in conversations.read_as(source, FORMATS, notes)]
    problems = []
    for chosen, rejected in pairs:
        ours, theirs = ([*map(_said, side.messages)] for side in (chosen, rejected))
        if ours[:-1] != theirs[:-1]:
            problems.append(f"{chosen.where}: chosen and rejected answer different questions")
        elif ours[-1] == theirs[-1]:
            problems.append(f"{chosen.where}: chosen and rejected are the same answer")
    if problems:
        raise UserError.all(problems[: conversations.MAX_PROBLEMS])
    return pairs


def of_skills(n: int, seed: int, held_out: bool = False) -> list[Pair]:
    """`synthetic.skills`, and as the rejected answer that of the next other question of the same skill."""
    talks = synthetic.skills(n, seed, held_out)
    of_skill: dict[str, list[Conversation]] = {}
    for talk in talks:
        of_skill.setdefault(talk.where.split(":")[0], []).append(talk)
    pairs = []
    for some in of_skill.values():
        for i, talk in enumerate(some):
            answers = [other.messages[-1] for other in some[i + 1 :] + some[:i]]
            if wrong := [answer for answer in answers if answer != talk.messages[-1]]:
                pairs.append(Pair(talk, Conversation((*talk.messages[:-1], wrong[0]), talk.where)))
    return sorted(pairs, key=lambda pair: int(pair.chosen.where.split(":")[1]))


# --- rows


def encode(
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    *,
    style: Style | None = None,
    context_length: int,
    because: str = "",
) -> EncodedPairs:
    """Both sides of every pair, without those pairs that are too long for a row of both; what is learned is the last
    answer with its end, whatever was answered before.

    Args:
        because: where the context_length comes from, for the error where nothing fits.

    Raises:
        UserError: as of `conversations.render`; no pair fits.
    """
    texts = [getattr(pair, side) for pair in pairs for side in SIDES]
    both = conversations.encode(texts, tokenizer, style=style, context_length=1 << 30)
    examples = []
    for ids, weights in zip(both.rows, both.weights, strict=True):
        last = np.flatnonzero(np.diff(weights, prepend=0) > 0)[-1]  # where the last run of ones begins
        examples.append((ids, np.where(np.arange(len(weights)) < last, 0, weights).astype(np.float32)))
    whole = list(zip(examples[::2], examples[1::2], strict=True))
    lengths = [sum(len(ids) - 1 for ids, _ in pair) for pair in whole]
    sides = [pair for pair, length in zip(whole, lengths, strict=True) if length <= context_length]
    if not sides:
        needs = f"and the shortest needs {min(lengths)}" if lengths else "and there is none"
        raise UserError(
            f"no pair fits a context of {context_length} tokens{because}: both of its sides stand in one row, {needs}"
        )
    return EncodedPairs(sides, len(pairs) - len(sides))


def rows(encoded: EncodedPairs, context_length: int | None = None, packed: bool = True) -> PairRows:
    """Rows of `context_length` (None: the longest pair): with as many pairs as fit, or with one each, in order."""
    lengths = np.array([sum(len(ids) - 1 for ids, _ in pair) for pair in encoded.sides])
    width = context_length or int(lengths.max())
    places = packing.first_fit(lengths, width) if packed else [(i, 0) for i in range(len(lengths))]
    held = packing.members(places)
    out = packing.empty(len(held), width)
    index = np.full((len(held), max(map(len, held))), -1, np.int32)
    for row, some in enumerate(held):
        for p, i in enumerate(some):
            start, index[row, p] = places[i][1], i
            for side, (ids, weights) in enumerate(encoded.sides[i]):
                here = slice(start, start + len(ids) - 1)
                out.tokens[row, here], out.targets[row, here], out.weights[row, here] = ids[:-1], ids[1:], weights[1:]
                out.segment_ids[row, here] = 2 * p + 1 + side
                start = here.stop
    return PairRows(*out, index)


def batch(rows: PairRows, step: int, *, batch_size: int, seed: int, reference: np.ndarray | None = None) -> PairBatch:
    """The batch of `step`: every row once an epoch, in a new order each time.

    Args:
        reference: [pairs, 2], as `PairBatch` has it.
    """
    return _batch(rows, loader.epoch_rows(step, batch_size, len(rows.tokens), seed), reference)


def eval_batches(rows: PairRows, batch_size: int, reference: np.ndarray | None = None) -> Iterator[PairBatch]:
    """All rows once, in their order; the last batch is filled up with pairs that do not count."""
    n = len(rows.tokens)
    for first in range(0, n, batch_size):
        index = np.arange(first, first + batch_size)
        some = _batch(rows, np.minimum(index, n - 1), reference)
        yield some._replace(present=some.present * (index < n)[:, None])


def _batch(rows: PairRows, index: np.ndarray, reference: np.ndarray | None) -> PairBatch:
    tokens, targets, weights, segment_ids, pairs = (leaf[index] for leaf in rows)
    before = np.zeros((*pairs.shape, 2), np.float32) if reference is None else reference[pairs]
    present = (pairs >= 0).astype(np.float32)
    return PairBatch(tokens, targets, weights, segment_ids, present, before)
