"""Reads, encodes and packs text classification data, and computes each batch as a pure function of (seed, step).

Example:
    data   = read("SMSSpamCollection.tsv")              texts, labels [n] and the class names ("ham", "spam")
    splits = split_labelled(data, seed=0)               train, val, test; duplicates removed
    train  = encode(splits.train, tokenizer, 120)       token ids and labels
    train  = rows(train)                                tokens [n, T], up to K texts per row, one segment each
    batch(train, 7, batch_size=8, seed=0)               tokens [8, T], segment_ids [8, T], labels and weights [8, K]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gptjax._moved import moved_name
from gptjax.data import loader, packing
from gptjax.errors import UserError, complaints
from gptjax.formats import tables
from gptjax.tokenizers import Tokenizer

MAX_PROBLEMS = 20
MOST_CLASSES = 1000


class Labelled(NamedTuple):
    """Labelled texts: `labels` [n] int32 holds class indices, and names[labels[i]] is the class name of texts[i]."""

    texts: list[str]
    labels: np.ndarray
    names: tuple[str, ...]

    def take(self, rows: Sequence[int] | np.ndarray) -> Labelled:
        return Labelled([self.texts[i] for i in rows], self.labels[np.asarray(rows, int)], self.names)


class Examples(NamedTuple):
    """Texts as token ids: ids[i] int32 holds the token ids of text i, and labels[i] is the class index of text i."""

    ids: list[np.ndarray]
    labels: np.ndarray
    cut: int  # number of texts that were truncated to the maximum length


class Rows(NamedTuple):
    """A classification data set as n rows of T tokens; each row holds up to K texts.

    Arrays:
        tokens       [n, T] int32
        segment_ids  [n, T] int32: k + 1 for the tokens of text k of the row, 0 for padding
        texts        [n, K] int32: indices of the row's texts in the data set, -1 where a row has fewer than K texts
        labels       [n, K] int32: labels of these texts
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    texts: np.ndarray
    labels: np.ndarray


class LabelledBatch(NamedTuple):
    """A batch of B rows of classification data. The arrays tokens and segment_ids [B, T] and labels [B, K] have the
    same meaning as in `Rows`. The array weights [B, K] float32 is 1 for a text, and 0 for a missing text if a row has
    fewer than K texts.
    """

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
    """Read labelled texts from a .csv, .tsv, .json (array), .jsonl or .parquet file, or from hf:org/name.

    A .tsv file without a header must have two columns, the label and the text. The fields "NA" and "null" of a table
    are read as texts, not as missing values.

    Args:
        text: name of the column with the text. None: the column whose name is in `tables.TEXT`; there must be exactly
            one such column.
        label: name of the column with the label. None: the column whose name is in `tables.LABEL`; there must be
            exactly one such column.
        labels: names of the classes, in the order of their indices. If `labels` is empty, the classes are the labels
            that occur in the data, sorted, whole numbers by value.
        quoted: True: if a cell of a .tsv file begins with a quote, the cell extends to the next quote, even across
            lines, as in pandas. False: quotes are ordinary characters.

    Raises:
        UserError: rows cannot be parsed, texts are empty or labels are unknown (the message lists the first 20
            problems), a column is missing, or there are fewer than two classes, or so many that the label column is
            probably the wrong one.
    """
    rows = tables.tsv(source, quoted) if source.lower().endswith(".tsv") else tables.read(source)
    texts: list[str] = []
    classes: list[str] = []  # class name of each text
    problems: list[str] = []
    for location, row in rows:
        if len(problems) >= MAX_PROBLEMS:
            problems.append("... there may be more")
            break
        if isinstance(row, UserError):
            problems.append(f"{location}: {row}")
            continue
        if not (text and label):
            text, label = _columns(row, text, label, source)
        if missing := [name for name in (text, label) if name not in row]:
            raise UserError(f"{location}: no column {', '.join(map(repr, missing))}; there are {tables.names(row)}")
        invalid = _check_row(row[text], row[label], labels)
        problems += [f"{location}: {line}" for line in invalid]
        if not invalid:
            texts.append(row[text])
            classes.append(_name(row[label]))
    if problems:
        raise UserError.all(problems)
    names = tuple(labels) or tuple(sorted(set(classes), key=lambda name: (int(name) if name.isdecimal() else -1, name)))
    if len(names) < 2:
        raise UserError(f"{source}: {len(texts)} texts of {len(names)} class ({', '.join(names)}); two are needed")
    if len(names) == len(texts) >= 10 and not labels:
        raise UserError(
            f"{source}: column {label!r} has a different value in each of its {len(texts)} rows: is it the label? "
            "Name the column with classify.label_field=NAME"
        )
    if len(names) > MOST_CLASSES:
        raise UserError(f"{source}: column {label!r} has {len(names)} different values: is it the label?")
    index = {name: i for i, name in enumerate(names)}
    return Labelled(texts, np.array([index[name] for name in classes], np.int32), names)


def _columns(row: dict[str, Any], text: str | None, label: str | None, source: str) -> tuple[str, str]:
    """Returns the names of the text column and the label column.

    If `text` is None, the text column is the column whose name is in `tables.TEXT`. If `label` is None, the label
    column is the column whose name is in `tables.LABEL`.
    """
    find_text = partial(_column, row, tables.TEXT, "text", "classify.text_field", source)
    find_label = partial(_column, row, tables.LABEL, "label", "classify.label_field", source)
    missing = [find for column, find in ((text, find_text), (label, find_label)) if not column]
    if problems := [line for find in missing for line in complaints(find)]:
        raise UserError.all(problems)
    return text or find_text(), label or find_label()


def _column(row: dict[str, Any], known: Sequence[str], content: str, setting: str, source: str) -> str:
    matches = [name for name in row if str(name).strip().lower() in known]
    if len(matches) != 1:
        usual = f"no column has a usual name ({', '.join(known[:3])}, ..) of"
        fault = "several columns could be" if matches else usual
        raise UserError(f"{source}: {fault} the {content}; the columns are {tables.names(row)}: say {setting}=NAME")
    return matches[0]


def _check_row(text: Any, label: Any, labels: Sequence[str]) -> list[str]:
    problems = []
    if not isinstance(text, str) or not text.strip():
        problems.append(
            "the text is empty" if text in ("", None) or isinstance(text, str) else f"{text!r} is not a text"
        )
    if isinstance(label, bool) or not isinstance(label, str | int) or not _name(label):
        problems.append(f"{label!r:.60} is not a label: expected a text or a whole number")
    elif labels and _name(label) not in labels:
        problems.append(f"unknown label {_name(label)!r:.60}: known are {', '.join(labels)}")
    return problems


def _name(label: str | int) -> str:
    return str(label).strip()


def balanced(data: Labelled, seed: int) -> Labelled:
    """Undersample the texts of every class, without replacement, to the size of the rarest class.

    Undersampling does not change the order of the texts.
    """
    rng = np.random.default_rng(seed)
    size = np.min(np.bincount(data.labels, minlength=len(data.names)))
    rows = [rng.permutation(np.flatnonzero(data.labels == k))[:size] for k in range(len(data.names))]
    return data.take(np.sort(np.concatenate(rows)))


# ---------------------------------------------------------------- batches


def encode(data: Labelled, tokenizer: Tokenizer, max_length: int, prompt: str = "{text}") -> Examples:
    """Encodes each text as token ids, after inserting the text in place of "{text}" in `prompt`.

    A text is truncated if the prompt with the text would exceed `max_length` tokens. Each example begins with the
    beginning-of-text token if `tokenizer.add_bos` is set.

    Raises:
        UserError: the prompt does not contain "{text}" exactly once, or is too long to leave space for a text, or a
            text has no tokens.
    """
    affixes = prompt.split("{text}")
    if len(affixes) != 2:
        raise UserError(f'classify.prompt: expected {{text}} once, as in "{{text}}\\nIs it spam?", got {prompt!r}')
    prefix, suffix = (tokenizer.encode(affix) if affix else [] for affix in affixes)
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        prefix = [tokenizer.bos_id, *prefix]
    max_text = max_length - len(prefix) - len(suffix)
    if max_text < 1:
        raise UserError(f"classify.prompt leaves no space for a text in {max_length} tokens")
    ids = [tokenizer.encode(text) for text in data.texts]
    if not all(ids):
        raise UserError(f"{data.texts[ids.index([])]!r:.60} has no tokens in {tokenizer.name}")
    prompted = [np.array([*prefix, *text_ids[:max_text], *suffix], np.int32) for text_ids in ids]
    return Examples(prompted, data.labels, sum(len(text_ids) > max_text for text_ids in ids))


def rows(examples: Examples, packed: bool = True) -> Rows:
    """Arranges the encoded texts in rows of tokens; every row is as long as the longest text.

    If `packed` is True, first-fit decreasing packs several texts into each row; otherwise each row holds one text, in
    input order.
    """
    lengths = np.array([len(text_ids) for text_ids in examples.ids])
    width = int(lengths.max())
    places = packing.first_fit(lengths, width) if packed else [(i, 0) for i in range(len(lengths))]
    members = packing.members(places)
    tokens = np.zeros((len(members), width), np.int32)
    segment_ids = np.zeros_like(tokens)
    texts = np.full((len(members), max(map(len, members))), -1, np.int32)
    for row, text_indices in enumerate(members):
        for k, i in enumerate(text_indices):
            span = slice(places[i][1], places[i][1] + len(examples.ids[i]))
            tokens[row, span], segment_ids[row, span], texts[row, k] = examples.ids[i], k + 1, i
    return Rows(tokens, segment_ids, texts, np.where(texts < 0, 0, examples.labels[texts]))


def batch(rows: Rows, step: int, *, batch_size: int, seed: int) -> LabelledBatch:
    """Returns the batch for training step `step`. Every epoch contains each row once, in a random order that changes
    from epoch to epoch.

    A batch may contain the last rows of one epoch and the first rows of the next.
    """
    return _batch(rows, loader.epoch_rows(step, batch_size, len(rows.tokens), seed))


def eval_batches(rows: Rows, batch_size: int) -> Iterator[LabelledBatch]:
    """Yields batches that contain every row once, in order; the last batch is padded with rows of weight 0."""
    n = len(rows.tokens)
    for first in range(0, n, batch_size):
        index = np.arange(first, first + batch_size)
        batch = _batch(rows, np.minimum(index, n - 1))
        yield batch._replace(weights=batch.weights * (index < n)[:, None])


def _batch(rows: Rows, index: np.ndarray) -> LabelledBatch:
    weights = (rows.texts[index] >= 0).astype(np.float32)
    return LabelledBatch(rows.tokens[index], rows.segment_ids[index], rows.labels[index], weights)


# ---------------------------------------------------------------- baselines


def majority(train: Labelled, test: Labelled) -> float:
    """Returns the accuracy on `test` of a classifier that always predicts the most frequent class of `train`."""
    return float((test.labels == np.argmax(np.bincount(train.labels))).mean())


def naive_bayes(train: Labelled, test: Labelled, tokenizer: Tokenizer) -> float:
    """Returns the accuracy on `test` of a multinomial naive Bayes classifier over tokens, with Laplace (add-one)
    smoothing."""
    counts = [Counter[int]() for _ in train.names]
    for text, k in zip(train.texts, train.labels, strict=True):
        counts[k].update(tokenizer.encode(text))
    V = len(set().union(*counts))
    prior = np.log(np.bincount(train.labels, minlength=len(counts)) / len(train.labels))
    totals = np.array([sum(count.values()) + V for count in counts])

    def predict(text: str) -> int:
        ids = tokenizer.encode(text)
        return int(np.argmax([
            p + sum(np.log((count[i] + 1) / total) for i in ids)
            for p, count, total in zip(prior, counts, totals, strict=True)
        ]))  # fmt: skip

    return float(np.mean([predict(text) == k for text, k in zip(test.texts, test.labels, strict=True)]))


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
