"""Labelled texts: read, encode, and batches as a pure function of (seed, step).

data   = read("SMSSpamCollection.tsv")              texts, labels [n], names ("ham", "spam")
splits = split_labelled(data, seed=0)               train, val, test; equal texts count once
train  = encode(splits.train, tokenizer, 120)       ids and label of each text
train  = rows(train)                                tokens [n, T], several texts in a row, each its own segment
batch(train, 7, batch_size=8, seed=0)               tokens [8, T], segment_ids [8, T], labels and weights [8, K]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax._moved import moved_name
from gptjax.data import loader, packing
from gptjax.errors import UserError
from gptjax.formats import tables
from gptjax.tokenizers import Tokenizer

MAX_PROBLEMS = 20
MOST_CLASSES = 1000


class Labelled(NamedTuple):
    """texts[i] is of class names[labels[i]]; labels int32."""

    texts: list[str]
    labels: np.ndarray
    names: tuple[str, ...]

    def take(self, rows: Sequence[int] | np.ndarray) -> Labelled:
        return Labelled([self.texts[i] for i in rows], self.labels[np.asarray(rows, int)], self.names)


class Examples(NamedTuple):
    """ids[i], int32, of class labels[i]."""

    ids: list[np.ndarray]
    labels: np.ndarray
    cut: int  # texts that were longer


class Rows(NamedTuple):
    """Rows of T places with up to K texts: tokens and segment_ids [n, T] int32, k + 1 where text k of the row stands, 0
    for padding; texts [n, K] int32, which text that is, -1 for none; labels [n, K] int32."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    texts: np.ndarray
    labels: np.ndarray


class LabelledBatch(NamedTuple):
    """As `Rows`: tokens, segment_ids [B, T], labels [B, K] int32; weights [B, K] float32, 0 where there is no text."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


# ---------------------------------------------------------------- reading


def read(
    source: str,
    *,
    text: str | None = None,
    label: str | None = None,
    labels: Sequence[str] = (),
    quoted: bool = False,
) -> Labelled:
    """The texts of a .csv, .tsv, .json (array), .jsonl or .parquet file, or of hf:org/name.

    A .tsv without a header has two columns, label and text. Nothing is guessed about values: "NA" and "null" are texts.

    Args:
        quoted: in a .tsv a text that begins with a quote goes on, over lines too, to the next one: so pandas reads it.
        text, label: the columns; None: the one whose name says so, if there is only one.
        labels: the classes in their order; empty: those that come, sorted.

    Raises:
        UserError: broken rows, empty texts, unknown labels (the first 20), columns that are not there, one class only.
    """
    rows = tables.tsv(source, quoted) if source.lower().endswith(".tsv") else tables.read(source)
    texts: list[str] = []
    found: list[str] = []  # the class of each
    problems: list[str] = []
    for where, row in rows:
        if len(problems) >= MAX_PROBLEMS:
            problems.append("... there may be more")
            break
        if isinstance(row, UserError):
            problems.append(f"{where}: {row}")
            continue
        text = text or _column(row, tables.TEXT, "text", "classify.text_field", source)
        label = label or _column(row, tables.LABEL, "label", "classify.label_field", source)
        if missing := [name for name in (text, label) if name not in row]:
            raise UserError(f"{where}: no column {', '.join(map(repr, missing))}; there are {tables.names(row)}")
        wrong = _wrong(row[text], row[label], labels)
        problems += [f"{where}: {line}" for line in wrong]
        if not wrong:
            texts.append(row[text])
            found.append(_name(row[label]))
    if problems:
        raise UserError.all(problems)
    names = tuple(labels) or tuple(sorted(set(found), key=lambda name: (int(name) if name.isdecimal() else -1, name)))
    if len(names) < 2:
        raise UserError(f"{source}: {len(texts)} texts of {len(names)} class ({', '.join(names)}); two are needed")
    if len(names) > MOST_CLASSES:
        raise UserError(f"{source}: column {label!r} has {len(names)} different values: is it the label?")
    number = {name: i for i, name in enumerate(names)}
    return Labelled(texts, np.array([number[name] for name in found], np.int32), names)


def _column(row: dict[str, Any], known: Sequence[str], what: str, setting: str, source: str) -> str:
    fits = [name for name in row if str(name).strip().lower() in known]
    if len(fits) != 1:
        several = "several columns could be" if fits else f"no column has a usual name ({', '.join(known[:3])}, ..) of"
        raise UserError(f"{source}: {several} the {what}; the columns are {tables.names(row)}: say {setting}=NAME")
    return fits[0]


def _wrong(text: Any, label: Any, labels: Sequence[str]) -> list[str]:
    problems = []
    if not isinstance(text, str) or not text.strip():
        problems.append("the text is empty" if text in ("", None) or isinstance(text, str) else f"{text!r} is no text")
    if isinstance(label, bool) or not isinstance(label, str | int) or not _name(label):
        problems.append(f"{label!r:.60} is no label: expected a text or a whole number")
    elif labels and _name(label) not in labels:
        problems.append(f"unknown label {_name(label)!r:.60}: known are {', '.join(labels)}")
    return problems


def _name(label: str | int) -> str:
    return str(label).strip()


def balanced(data: Labelled, seed: int) -> Labelled:
    """Each class as often as the rarest, drawn without replacement; what is left keeps its order."""
    rng = np.random.default_rng(seed)
    least = np.min(np.bincount(data.labels, minlength=len(data.names)))
    rows = [rng.permutation(np.flatnonzero(data.labels == k))[:least] for k in range(len(data.names))]
    return data.take(np.sort(np.concatenate(rows)))


# ---------------------------------------------------------------- batches


def encode(data: Labelled, tokenizer: Tokenizer, max_length: int, prompt: str = "{text}") -> Examples:
    """Every text as ids inside `prompt`; of what would be longer than `max_length` with it, the beginning of the text.

    A tokenizer whose texts begin with a token of their own (`add_bos`) puts it here too.

    Raises:
        UserError: a prompt without one "{text}", or longer than `max_length`; a text without tokens.
    """
    parts = prompt.split("{text}")
    if len(parts) != 2:
        raise UserError(f'classify.prompt: expected {{text}} once, as in "{{text}}\\nIs it spam?", got {prompt!r}')
    before, after = (tokenizer.encode(part) if part else [] for part in parts)
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        before = [tokenizer.bos_id, *before]
    room = max_length - len(before) - len(after)
    if room < 1:
        raise UserError(f"classify.prompt leaves no place for a text in {max_length} tokens")
    ids = [tokenizer.encode(text) for text in data.texts]
    if not all(ids):
        raise UserError(f"{data.texts[ids.index([])]!r:.60} has no tokens in {tokenizer.name}")
    whole = [np.array([*before, *some[:room], *after], np.int32) for some in ids]
    return Examples(whole, data.labels, sum(len(some) > room for some in ids))


def rows(examples: Examples, packed: bool = True) -> Rows:
    """Rows as long as the longest text: with as many texts as fit, or with one each, in their order."""
    lengths = np.array([len(some) for some in examples.ids])
    width = int(lengths.max())
    places = packing.first_fit(lengths, width) if packed else [(i, 0) for i in range(len(lengths))]
    held = packing.members(places)
    tokens = np.zeros((len(held), width), np.int32)
    segment_ids = np.zeros_like(tokens)
    texts = np.full((len(held), max(map(len, held))), -1, np.int32)
    for row, some in enumerate(held):
        for k, i in enumerate(some):
            here = slice(places[i][1], places[i][1] + len(examples.ids[i]))
            tokens[row, here], segment_ids[row, here], texts[row, k] = examples.ids[i], k + 1, i
    return Rows(tokens, segment_ids, texts, np.where(texts < 0, 0, examples.labels[texts]))


def batch(rows: Rows, step: int, *, batch_size: int, seed: int) -> LabelledBatch:
    """The batch of `step`: every row once an epoch, in a new order each time; one may reach into the next epoch."""
    return _batch(rows, loader.epoch_rows(step, batch_size, len(rows.tokens), seed))


def eval_batches(rows: Rows, batch_size: int) -> Iterator[LabelledBatch]:
    """All rows once, in their order; the last batch is filled up with rows of weight 0."""
    n = len(rows.tokens)
    for first in range(0, n, batch_size):
        index = np.arange(first, first + batch_size)
        some = _batch(rows, np.minimum(index, n - 1))
        yield some._replace(weights=some.weights * (index < n)[:, None])


def _batch(rows: Rows, index: np.ndarray) -> LabelledBatch:
    weights = (rows.texts[index] >= 0).astype(np.float32)
    return LabelledBatch(rows.tokens[index], rows.segment_ids[index], rows.labels[index], weights)


# ---------------------------------------------------------------- baselines


def majority(train: Labelled, test: Labelled) -> float:
    """Accuracy on `test` of always saying the commonest class of `train`."""
    return float((test.labels == np.argmax(np.bincount(train.labels))).mean())


def naive_bayes(train: Labelled, test: Labelled, tokenizer: Tokenizer) -> float:
    """Accuracy on `test` of multinomial naive Bayes: counts of the tokens that stand in `train`, one added to each."""
    words = [Counter[int]() for _ in train.names]
    for text, k in zip(train.texts, train.labels, strict=True):
        words[k].update(tokenizer.encode(text))
    V = len(set().union(*words))
    prior = np.log(np.bincount(train.labels, minlength=len(words)) / len(train.labels))
    totals = np.array([sum(count.values()) + V for count in words])

    def guess(text: str) -> int:
        ids = tokenizer.encode(text)
        return int(np.argmax([
            p + sum(np.log((count[i] + 1) / total) for i in ids)
            for p, count, total in zip(prior, words, totals, strict=True)
        ]))  # fmt: skip

    return float(np.mean([guess(text) == k for text, k in zip(test.texts, test.labels, strict=True)]))


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
