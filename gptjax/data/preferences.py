"""Reads preference pairs (a chosen and a rejected answer to the same prompt), and packs the pairs into rows for DPO.

    pairs = read("preferences.jsonl")                 {"prompt": .., "chosen": .., "rejected": ..}
    rows_ = rows(encode(pairs, tok, context_length=256), 256)
    batch(rows_, 7, batch_size=4, seed=0)

Both answers of a preference pair are in the same row; each answer is a segment with its own copy of the prompt:

    tokens        a b c a b d   e f g h e f h .       pair 0: prompt "ab", answers "cE" and "dE", where E ends an
    segment_ids   1 1 1 2 2 2   3 3 3 3 4 4 4 0       answer and is only a target; pair p of a row has the segment ids
                                                      2 p + 1 (chosen) and 2 p + 2 (rejected); 0 is padding
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax._moved import moved_name
from gptjax.data import conversations, loader, packing, synthetic
from gptjax.data.conversations import Conversation, Formats, Parse, Parsed
from gptjax.errors import UserError
from gptjax.formats import tables
from gptjax.formats.tables import Record, Records
from gptjax.tokenizers.base import Tokenizer, found_in
from gptjax.tokenizers.chat import Style

RESPONSES = ("chosen", "rejected")
SCORED = ("prompt", "answer", "reward")


class Pair(NamedTuple):
    """A preference pair: two conversations that differ only in their last answer."""

    chosen: Conversation
    rejected: Conversation


# Token ids and loss weights of a conversation: the weights are 1 for the last answer and its end token, else 0.
Example = tuple[np.ndarray, np.ndarray]


class EncodedPairs(NamedTuple):
    """Preference pairs as token ids: pairs[i] holds the chosen and the rejected example of pair i."""

    pairs: list[tuple[Example, Example]]
    dropped: int  # number of pairs left out because they are longer than the context


class PairRows(NamedTuple):
    """Rows of T tokens that hold up to P preference pairs each. The arrays tokens, targets, weights and segment_ids
    have the shape [n, T], as in `packing.Rows`. The array pairs [n, P] int32 holds the indices of the pairs in each
    row, and -1 where a row has fewer than P pairs.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segment_ids: np.ndarray
    pairs: np.ndarray


class PairBatch(NamedTuple):
    """A batch of B rows, each of which holds up to P preference pairs.

    Arrays:
        tokens, targets, segment_ids   [B, T] int32
        weights                        [B, T] float32, the loss weights of the targets
        present                        [B, P] float32, 1 for a pair, 0 where a row has fewer than P pairs
        reference                      [B, P, 2] float32, log-probabilities of the chosen and the rejected answer under
                                       the reference model; 0 if the loss needs no reference model
    """

    tokens: Any
    targets: Any
    weights: Any
    segment_ids: Any
    present: Any
    reference: Any


# --- reading


def _pair(prompt: str, extra: str = "") -> Parse:
    """Returns a parser for records that have a prompt and two answers.

    An answer is a string, or a list of messages, which may include the prompt.
    """

    def parse(record: Record) -> tuple[Parsed, ...]:
        if any(isinstance(record[response], list) for response in RESPONSES):
            return tuple(_with_prompt(prompt, record, response) for response in RESPONSES)
        if isinstance(record[prompt], list):
            prompt_turns = conversations.turns(prompt)(record)
            if isinstance(prompt_turns, str):
                return (prompt_turns,)
        else:
            user = {"role": "user", "content": record[prompt]}
            if extra and record.get(extra) not in ("", None):
                user["input"] = record[extra]
            prompt_turns = [(prompt, user)]
        return tuple(
            [*prompt_turns, (response, {"role": "assistant", "content": record[response]})] for response in RESPONSES
        )

    return parse


def _with_prompt(prompt: str, record: Record, response: str) -> Parsed:
    """Returns the messages of the prompt followed by the messages of the response.

    A response that is a list of messages and does not begin with an answer must include the prompt, and is returned
    unchanged. Returns an error message if the response neither begins with an answer nor includes the prompt.
    """
    response_turns = conversations.turns(response)(record)
    if isinstance(response_turns, str) or not response_turns:
        return response_turns
    as_text = not isinstance(record[prompt], list)
    user = {"role": "user", "content": record[prompt]}
    prompt_turns = [(prompt, user)] if as_text else conversations.turns(prompt)(record)
    if isinstance(prompt_turns, str):
        return prompt_turns
    contents = [_content(message) for _, message in response_turns]
    if contents[: len(prompt_turns)] == [_content(message) for _, message in prompt_turns]:
        return response_turns
    if contents[0][0] == "assistant":
        return [*prompt_turns, *response_turns]
    # The response includes the prompt as a later message, for example after a system message.
    if as_text and ("user", record[prompt]) in contents:
        return response_turns
    return (
        f"{response}: expected messages that begin with those of {prompt}, or the answer of role assistant alone; "
        f"found role {contents[0][0]!r:.40} with other content first"
    )


def _content(message: dict[str, Any]) -> tuple[Any, Any]:
    return message["role"], message["content"]


FORMATS: Formats = {
    ("prompt", *RESPONSES): (
        '{"prompt": .., "chosen": .., "rejected": ..}, texts or lists of messages; or scored answers: {"prompt": .., '
        '"answer": .., "reward": ..}, several per prompt',
        _pair("prompt"),
    ),
    ("instruction", *RESPONSES): (
        '{"instruction": .., "input": .. (optional), "chosen": .., "rejected": ..}',
        _pair("instruction", "input"),
    ),
    RESPONSES: (
        '{"chosen": [{"role": .., "content": ..}, ..], "rejected": [..]}',
        lambda record: tuple(conversations.turns(response)(record) for response in RESPONSES),
    ),
}


def read(source: str, notes: list[str] | None = None, special: Collection[str] = ()) -> list[Pair]:
    """Reads the preference pairs of a .json (array), .jsonl, .parquet or .csv file, or of hf:org/name[:config][@split].

    Scored answers ({"prompt": .., "answer": .., "reward": ..}, several answers per prompt), such as the answers in the
    rollouts.jsonl of a run of `gptjax finetune reward`, become preference pairs. For each prompt, every answer with
    less than the highest reward is the rejected answer of one pair, and the answers with the highest reward take turns
    as the chosen answer. If no answer has a reward above 0 and the records have the expected answer (`expected`), the
    expected answer is the chosen answer. Equal answers to a prompt count as one answer with the mean of their rewards.
    A scored answer is left out if it is empty, if its reward is null, or if it contains a special token, as samples of
    a model may.

    Args:
        notes: list to which a line of text that names the ignored keys is appended, as in `conversations.read`. None:
            the line is printed to stderr.
        special: the texts of the special tokens, which a chat template could not write as part of an answer.

    Raises:
        UserError: the file cannot be read or has invalid records (see `conversations.read`); the two conversations
            of a pair have different prompts, or the same answer (the message lists the first 20 such pairs); or the
            scored answers make no pair.
    """
    records = _pairs(tables.read(source), source, special)
    pairs = [Pair(*talks) for talks in conversations.read_as(source, FORMATS, notes, records)]
    problems = []
    for chosen, rejected in pairs:
        preferred, other = ([*map(_content, talk.messages)] for talk in (chosen, rejected))
        if preferred[:-1] != other[:-1]:
            problems.append(f"{chosen.where}: chosen and rejected answer different questions")
        elif preferred[-1] == other[-1]:
            problems.append(f"{chosen.where}: chosen and rejected are the same answer")
    if problems:
        raise UserError.all(problems[: conversations.MAX_PROBLEMS])
    return pairs


def _pairs(records: Records, source: str, special: Collection[str]) -> Records:
    """Yields the records that are not scored answers, and then the preference pairs that `read` makes of scored
    answers."""
    others = False
    # Each prompt is mapped to its first location, its first record, and the rewards of each answer to the prompt.
    prompts: dict[str, tuple[str, Record, dict[str, list[float]]]] = {}
    for location, record in records:
        if isinstance(record, UserError) or not {*SCORED} <= record.keys() or {*RESPONSES} & record.keys():
            others = True
            yield location, record
            continue
        reward = _reward(record)
        if isinstance(reward, float):
            asked = repr([record.get(key) for key in ("system", "history", "prompt")])
            *_, rewards = prompts.setdefault(asked, (location, record, {}))
            answer = record["answer"].strip()
            if answer and not math.isnan(reward) and not found_in(answer, special):
                rewards.setdefault(answer, []).append(reward)
        else:
            others = True
            yield location, reward
    pairs = [
        (location, pair) for location, record, rewards in prompts.values() for pair in _of_answers(record, rewards)
    ]
    if prompts and not (pairs or others):
        raise UserError(f"{source}: no pair can be made: all answers to a prompt have the same reward, for each prompt")
    yield from pairs


def _reward(record: Record) -> float | UserError:
    """Returns the reward of a scored answer, NaN for null or an empty cell, or a UserError for an invalid reward."""
    if not all(isinstance(record[key], str) for key in ("prompt", "answer")):
        return UserError("prompt and answer: expected texts")
    try:
        reward = math.nan if record["reward"] in (None, "") else float(record["reward"])
    except (TypeError, ValueError):
        reward = math.inf
    if math.isinf(reward):
        found = repr(record["reward"])
        return UserError(f"reward: expected a finite number, or null for an answer without one, found {found:.40}")
    return reward


def _of_answers(first: Record, rewards: dict[str, list[float]]) -> list[Record]:
    """Returns preference pairs of the answers to one prompt, chosen and rejected by the mean reward of each answer.

    Args:
        first: a scored answer to the prompt, from which the system message, the history and the expected answer are
            taken.
    """
    means = {answer: sum(values) / len(values) for answer, values in rewards.items()}
    best, expected = max(means.values(), default=0.0), first.get("expected")
    chosen = [answer for answer, mean in means.items() if mean == best]
    if best <= 0 and isinstance(expected, str) and expected.strip():
        chosen = [expected.strip()]
    rejected = [answer for answer in means if answer not in chosen]
    system = [{"role": "system", "content": first["system"]}] if first.get("system") else []
    prompt = [*system, *(first.get("history") or []), {"role": "user", "content": first["prompt"]}]
    return [
        {"prompt": prompt, "chosen": right, "rejected": wrong}
        for right, wrong in zip(itertools.cycle(chosen), rejected, strict=False)
    ]


def of_skills(n: int, seed: int, held_out: bool = False) -> list[Pair]:
    """Returns preference pairs made from synthetic questions and answers (`synthetic.skills`).

    The rejected answer of a pair is the answer to the next question of the same type (skill) that has a different
    answer.
    """
    talks = synthetic.skills(n, seed, held_out)
    of_skill: dict[str, list[Conversation]] = {}
    for talk in talks:
        of_skill.setdefault(talk.where.split(":")[0], []).append(talk)
    pairs = []
    for same_skill in of_skill.values():
        for i, talk in enumerate(same_skill):
            answers = [other.messages[-1] for other in same_skill[i + 1 :] + same_skill[:i]]
            if wrong := [answer for answer in answers if answer != talk.messages[-1]]:
                pairs.append(Pair(talk, Conversation((*talk.messages[:-1], wrong[0]), talk.where)))
    return sorted(pairs, key=lambda pair: int(pair.chosen.where.split(":")[1]))


def of_mistakes(n: int, seed: int, held_out: bool = False) -> list[Pair]:
    """Returns n preference pairs made from the same questions as the pairs of `of_skills`.

    The rejected answer of a pair is a wrong answer to the same question (`synthetic.wrong_answer`), so that a reward
    model has to learn which answers are right. From the pairs of `of_skills`, a reward model learns only which answers
    belong to a question.
    """
    rng = random.Random(f"{seed} {held_out} mistakes")
    pairs = []
    for talk in synthetic.skills(n, seed, held_out):
        wrong = {"role": "assistant", "content": synthetic.wrong_answer(talk, rng)}
        pairs.append(Pair(talk, Conversation((*talk.messages[:-1], wrong), talk.where)))
    return pairs


# --- rows


def encode(
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    *,
    style: Style | None = None,
    context_length: int,
    because: str = "",
    end_as_input: bool = False,
) -> EncodedPairs:
    """Encodes both conversations of each pair as token ids. The loss covers only the last answer and its end token.

    Pairs whose two conversations together do not fit in `context_length` tokens are dropped and counted.

    Args:
        because: text that the error message adds to "no pair fits a context of .. tokens": the setting that the context
            length comes from, such as " (prefer.context_length)".
        end_as_input: whether the token that ends an answer is also an input of the model, for a reward model, which
            reads the hidden state of this token. Its target is a filler without loss weight.

    Raises:
        UserError: a conversation cannot be rendered, for a reason that `conversations.render` lists, or no pair fits in
            the context.
    """
    talks = [getattr(pair, response) for pair in pairs for response in RESPONSES]
    examples = []
    for turns in conversations.turns_of(talks, tokenizer, style):
        prompt, answer, _ = turns[-1]
        filler = answer[-1:] * end_as_input
        weights = np.repeat(np.array([0, 1, 0], np.float32), [len(prompt), len(answer), len(filler)])
        examples.append((np.array(prompt + answer + filler, np.int32), weights))
    all_pairs = list(zip(examples[::2], examples[1::2], strict=True))
    lengths = [sum(len(ids) - 1 for ids, _ in pair) for pair in all_pairs]
    fitting = [pair for pair, length in zip(all_pairs, lengths, strict=True) if length <= context_length]
    if not fitting:
        needs = f"and the shortest needs {min(lengths)}" if lengths else "and there is none"
        raise UserError(
            f"no pair fits a context of {context_length} tokens{because}: both answers go in one row, {needs}"
        )
    return EncodedPairs(fitting, len(pairs) - len(fitting))


def rows(encoded: EncodedPairs, context_length: int | None = None, packed: bool = True) -> PairRows:
    """Arranges the pairs in rows of `context_length` tokens or, if `context_length` is None, in rows as long as the
    longest pair.

    If `packed` is True, first-fit decreasing packs several pairs into each row; otherwise each row holds one pair, in
    input order.
    """
    lengths = np.array([sum(len(ids) - 1 for ids, _ in pair) for pair in encoded.pairs])
    width = context_length or int(lengths.max())
    places = packing.first_fit(lengths, width) if packed else [(i, 0) for i in range(len(lengths))]
    members = packing.members(places)
    out = packing.empty(len(members), width)
    index = np.full((len(members), max(map(len, members))), -1, np.int32)
    for row, pair_ids in enumerate(members):
        for p, i in enumerate(pair_ids):
            start, index[row, p] = places[i][1], i
            for rejected, (ids, weights) in enumerate(encoded.pairs[i]):
                span = slice(start, start + len(ids) - 1)
                out.tokens[row, span], out.targets[row, span], out.weights[row, span] = ids[:-1], ids[1:], weights[1:]
                out.segment_ids[row, span] = 2 * p + 1 + rejected
                start = span.stop
    return PairRows(*out, index)


def batch(rows: PairRows, step: int, *, batch_size: int, seed: int, reference: np.ndarray | None = None) -> PairBatch:
    """Returns the batch for training step `step`. Every epoch contains each row once, in a random order that changes
    from epoch to epoch.

    Args:
        reference: log-probabilities [number of pairs, 2] of the chosen and the rejected answers under the reference
            model. None: zeros.
    """
    return _batch(rows, loader.epoch_rows(step, batch_size, len(rows.tokens), seed), reference)


def eval_batches(rows: PairRows, batch_size: int, reference: np.ndarray | None = None) -> Iterator[PairBatch]:
    """Yields batches that contain every row once, in order. If the last batch is incomplete, the batch is filled with
    copies of the last row, for whose pairs `present` is 0."""
    n = len(rows.tokens)
    for first in range(0, n, batch_size):
        index = np.arange(first, first + batch_size)
        batch = _batch(rows, np.minimum(index, n - 1), reference)
        yield batch._replace(present=batch.present * (index < n)[:, None])


def _batch(rows: PairRows, index: np.ndarray, reference: np.ndarray | None) -> PairBatch:
    tokens, targets, weights, segment_ids, pairs = (leaf[index] for leaf in rows)
    log_probs = np.zeros((*pairs.shape, 2), np.float32) if reference is None else reference[pairs]
    present = (pairs >= 0).astype(np.float32)
    return PairBatch(tokens, targets, weights, segment_ids, present, log_probs)


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
