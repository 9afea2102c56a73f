"""Splits data of every kind into training, validation and test data.

    split_documents   pretraining           holds out the tail of each file, or whole documents or files
    split_labelled    classification        splits stratified by class, grouped by equal texts, or as in the book
    split_records     instructions, pairs   splits the records of a file in their order; without a file, makes synthetic
                                            questions, and splits them by `is_held_out`

The splits named after a book follow "Build a Large Language Model (From Scratch)" by Sebastian Raschka.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from gptjax._moved import moved_name
from gptjax.config import (
    DataConfig,
    DistillConfig,
    InstructConfig,
    PreferConfig,
    RewardConfig,
    RewardModelConfig,
)
from gptjax.data.sources import Document, Documents, Source
from gptjax.errors import UserError

if TYPE_CHECKING:
    from gptjax.data.classification import Labelled

T = TypeVar("T")
MAX_PROBLEMS = 10
BOOK_SEED = 123
# Maximum numbers of synthetic validation and test questions, which are small because a model takes time to answer
# questions.
HELD_OUT = 80, 200
ONE_OF = 5  # One in ONE_OF subjects of synthetic questions (a word, a sum, ..) is held out.


# --- pretraining


@dataclass(frozen=True)
class Subset:
    """One side of a train/validation split: the text for training, or the text that is held out from training.

    Attributes:
        n_documents  number of documents of all sources, before the split
        cuts         cuts[k][i]: number of characters at the start of document i of source k that are for training,
                     while the rest is held out; None: the documents are not split
    """

    documents: Documents
    n_documents: int
    cuts: tuple[np.ndarray, ...] | None = None
    held_out: bool = False

    def __iter__(self) -> Iterator[Document]:
        return (document for k in range(len(self.documents.sources)) for document, *_ in self.source(k))

    def source(self, k: int) -> Iterator[tuple[Document, bool, bool]]:
        """Yields the documents of source k that have text in the `Subset`, each with the two flags `begins` and `ends`.

        The flags `begins` and `ends` state whether the text of a document in the `Subset` starts at the start of the
        document and ends at the end of the document. If the tail of a document is held out, `begins` is False for the
        tail, and `ends` is False for the text before the tail. In a corpus of a single document, `begins` and `ends`
        are False, because from one document a model cannot learn how documents begin and end.
        """
        for i, document in enumerate(self.documents.sources[k]):
            text, begins = document.text, self.n_documents > 1
            ends = begins
            if self.cuts is not None:
                cut = self.cuts[k][i]
                begins &= not (self.held_out and cut)
                ends &= self.held_out or cut == len(text)
                text = text[cut:] if self.held_out else text[:cut]
            if text:
                yield document._replace(text=text), bool(begins), bool(ends)


def split_documents(
    documents: Documents, cfg: DataConfig, val: Documents | None = None
) -> tuple[Subset, Subset, list[dict]]:
    """Returns (train, val, how). Each data source is split separately, so that val contains text of all sources.

    The setting data.split determines which text is held out for validation:

        tail      the last val_fraction of the characters of each file
        document  whole documents with about val_fraction of the bytes of the source. They are chosen by a hash of their
                  names (see `hold_out`), independently of the seed and of the order of the documents, so that runs with
                  different seeds can be compared.
        file      whole files, chosen in the same way as documents
        auto      as document for a source with 10 or more documents, else as tail

    If data.val_source is set, `val` must contain the documents of data.val_source. If `val` is given, `val` is the
    validation split, and all of `documents` are for training.

    The list `how` has one dict per data source with the keys source, split, documents and bytes. In a dict of `how`,
    the value of the key split is tail, document or file, or none if `val` is given. A dict of `how` whose value of
    split is not none has the additional key held_out, with the names of the first 100 documents or files that are held
    out, at least in part.
    """
    if val is not None:
        how, counts = [], [0, 0]
        for i, subset in enumerate((documents, val)):
            for source in subset.sources:
                sizes = measure(source)
                counts[i] += len(sizes.names)
                size = {"documents": len(sizes.names), "bytes": int(sizes.bytes.sum())}
                how.append({"source": source.name, "split": "none", **size})
        return Subset(documents, counts[0]), Subset(val, counts[1]), how
    if not 0 < cfg.val_fraction < 1:
        raise UserError(f"data.val_fraction ({cfg.val_fraction}) must be between 0 and 1, or give data.val_source")
    cuts, descriptions = zip(*(_cut(source, cfg) for source in documents.sources), strict=True)
    n = sum(how["documents"] for how in descriptions)
    return Subset(documents, n, cuts), Subset(documents, n, cuts, held_out=True), list(descriptions)


class Sizes(NamedTuple):
    """The name, the length in characters, the length in bytes and the file index of each document of a data source."""

    names: list[str]
    characters: np.ndarray
    bytes: np.ndarray
    groups: np.ndarray


def measure(source: Source) -> Sizes:
    """Read all documents of a data source once, to measure the documents and to find invalid files.

    Raises:
        UserError: files cannot be read or are invalid (the message lists the first 10 of them).
    """
    names: list[str] = []
    sizes: list[tuple[int, int, int]] = []
    problems: list[str] = []
    for group, (_, read) in enumerate(source.files):
        remaining = None if source.max_documents is None else source.max_documents - len(names)
        try:
            for document in islice(read(), remaining):
                names.append(document.name)
                sizes.append((len(document.text), len(document.text.encode("utf-8")), group))
        except OSError as error:
            problems.append(f"{error.filename}: cannot be read: {error.strerror}")
        except UserError as error:
            problems.append(str(error))
        if len(problems) >= MAX_PROBLEMS:
            break
    if problems:
        raise UserError.all(problems)
    table = np.asarray(sizes, np.int64).reshape(-1, 3)
    return Sizes(names, *table.T)


def _cut(source: Source, cfg: DataConfig) -> tuple[np.ndarray, dict[str, Any]]:
    sizes = measure(source)
    n = len(sizes.names)
    split = cfg.split if cfg.split != "auto" else ("document" if n >= 10 else "tail")
    how = {"source": source.name, "split": split, "documents": n, "bytes": int(sizes.bytes.sum())}
    if split == "tail":
        cuts = _tail_cuts(sizes, cfg.val_fraction)
        held = [sizes.names[i] for i in np.flatnonzero(cuts < sizes.characters)[:100]]
        return cuts, {**how, "held_out": held}
    if split == "document":
        units, names = np.arange(n), sizes.names
    else:
        files, units = np.unique(sizes.groups, return_inverse=True)
        names = [source.files[i][0] for i in files]
    if len(names) < 2:
        raise UserError(
            f"data.split={split} needs at least 2 {split}s in data.source={source.name}, found {len(names)}: "
            "use data.split=tail"
        )
    chosen = hold_out(names, np.bincount(units, sizes.bytes, len(names)), cfg.val_fraction)
    cuts = np.where(chosen[units], 0, sizes.characters)
    held = [names[i] for i in np.flatnonzero(chosen)[:100]]
    return cuts, {**how, "held_out": held}


def _tail_cuts(sizes: Sizes, fraction: float) -> np.ndarray:
    """Cuts each file after the first int((1 - fraction) * characters) characters, even inside a document.

    Returns the number of characters before the cut in each document, [n] int64.
    """
    totals = np.bincount(sizes.groups, sizes.characters) if len(sizes.names) else np.zeros(1)
    begin = np.cumsum(sizes.characters) - sizes.characters
    first = np.r_[0, np.cumsum(totals)][sizes.groups]
    cut = np.floor(round(1 - fraction, 12) * totals)[sizes.groups]
    return np.clip(cut - (begin - first), 0, sizes.characters).astype(np.int64)


def hold_out(names: list[str], sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Returns a mask [n] bool of the documents or files to hold out: at least one of them, and never all of them.

    The items (documents or files) are tried in the order of the hashes of their names. A document or file is held out
    if holding it out brings the held-out size closer to `fraction` of the total size. Before the first document or file
    is held out, items that are too large for `fraction` are skipped; after the first is held out, an item that is too
    large ends the search. If all tried documents or files are too large for `fraction`, the smallest document or file
    is held out.

    Args:
        names: names of the items.
        sizes: size of each item, in any unit.
        fraction: proportion of the total size to hold out.
    """
    order = sorted(range(len(names)), key=lambda i: _hash(names[i]))
    target, taken = fraction * float(np.sum(sizes)), 0.0
    chosen = np.zeros(len(names), bool)
    for i in order[:-1]:
        if abs(taken + sizes[i] - target) < abs(taken - target):
            chosen[i], taken = True, taken + sizes[i]
        elif taken:
            break
    if not taken:
        chosen[int(np.argmin(sizes))] = True
    return chosen


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "replace")).digest()


# --- classification


class LabelledSplits(NamedTuple):
    """Labelled texts for training, validation and test. `leaked` is the number of texts of val and test that also occur
    in train."""

    train: Labelled
    val: Labelled
    test: Labelled
    leaked: int


def split_labelled(
    data: Labelled,
    *,
    how: Literal["stratified", "grouped", "book"] = "stratified",
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    seed: int = 0,
    deduplicate: bool = True,
) -> LabelledSplits:
    """Split labelled texts into training, validation and test texts.

        stratified  each class is split by `fractions`
        grouped     all texts are split by `fractions`, but equal texts are always in the same split
        book        as in chapter 6 of the book: the classes are undersampled to equal size, shuffled with pandas and
                    the book's seed, and split by the book's fractions (`fractions` and `seed` are not used)

    Args:
        how: the kind of split, one of those listed above: stratified, grouped or book.
        fractions: proportions of train, validation and test.
        deduplicate: whether to keep only the first of several texts that are equal up to case and whitespace. With
            `book` the texts are deduplicated after the split: duplicates are removed within each split, and texts that
            also occur in an earlier split are removed from validation and test.

    Raises:
        UserError: a split is empty, or a class has no training texts.
    """
    seen: set[str] = set()
    if how == "book":
        splits = [data.take(rows) for rows in _book(data)]
        if deduplicate:
            splits = [split.take(_unseen(split.texts, seen)) for split in splits]
    else:
        if deduplicate:
            data = data.take(_unseen(data.texts, seen))
        divide = _grouped if how == "grouped" else _stratified
        splits = [data.take(rows) for rows in divide(data, fractions, np.random.default_rng(seed))]
    for name, split in zip(("train", "validate", "test"), splits, strict=True):
        if not split.texts:
            raise UserError(
                f"{len(data.texts)} texts of {len(data.names)} classes leave none to {name} on: give more texts, or "
                "larger fractions (classify.val_fraction, classify.test_fraction)"
            )
    train, val, test = splits
    lacking = [train.names[k] for k in range(len(data.names)) if not (train.labels == k).any()]
    if lacking:
        raise UserError(f"no text to train on is of class {', '.join(lacking)}: give more texts of it")
    known = {normalized(text) for text in train.texts}
    return LabelledSplits(train, val, test, sum(normalized(text) in known for text in (*val.texts, *test.texts)))


def normalized(text: str) -> str:
    """Returns the normalised form of a text: the text in lower case with single spaces.

    Texts with the same normalised form count as duplicates.
    """
    return " ".join(text.casefold().split())


def _unseen(texts: Sequence[str], seen: set[str]) -> list[int]:
    """Returns the indices of the texts whose normalised form is neither in `seen` nor the normalised form of an earlier
    text.

    The normalised forms of the texts at the returned indices are added to `seen`.
    """
    rows = []
    for i, text in enumerate(texts):
        if (key := normalized(text)) not in seen:
            seen.add(key)
            rows.append(i)
    return rows


def _stratified(data: Labelled, fractions: Sequence[float], rng: np.random.Generator) -> list[np.ndarray]:
    splits: list[list[np.ndarray]] = [[], [], []]
    for k in range(len(data.names)):
        rows = rng.permutation(np.flatnonzero(data.labels == k))
        ends = np.round(np.cumsum(fractions)[:2] * len(rows)).astype(int)
        for split, indices in zip(splits, np.split(rows, ends), strict=True):
            split.append(indices)
    return [np.sort(np.concatenate(split)) for split in splits]


def _grouped(data: Labelled, fractions: Sequence[float], rng: np.random.Generator) -> list[np.ndarray]:
    groups: dict[str, list[int]] = {}
    for i, text in enumerate(data.texts):
        groups.setdefault(normalized(text), []).append(i)
    order = [list(groups.values())[i] for i in rng.permutation(len(groups))]
    edges = np.cumsum(fractions)[:2] * len(data.texts)
    splits: list[list[int]] = [[], [], []]
    assigned = 0
    for group in order:
        splits[int(np.searchsorted(edges, assigned, "right"))] += group
        assigned += len(group)
    return [np.sort(np.array(split, int)) for split in splits]


def _book(data: Labelled) -> list[np.ndarray]:
    """Undersample the common class, append the rare class, shuffle the rows, and split the rows at 70 and 80 per cent.

    Source: the code for chapter 6 of "Build a Large Language Model (From Scratch)", with the same pandas calls and
    seed.
    """
    import pandas

    counts = np.bincount(data.labels, minlength=len(data.names))
    if len(data.names) != 2 or counts[0] == counts[1]:
        raise UserError(
            f"split=book needs two classes of different size, such as ham and spam: there are {counts.tolist()}"
        )
    rare = int(np.argmin(counts))
    frame = pandas.DataFrame({"row": np.arange(len(data.texts)), "label": data.labels})
    common = frame[frame["label"] != rare].sample(int(counts[rare]), random_state=BOOK_SEED)
    frame = pandas.concat([common, frame[frame["label"] == rare]])
    rows = frame.sample(frac=1, random_state=BOOK_SEED)["row"].to_numpy()
    first, second = int(len(rows) * 0.7), int(len(rows) * 0.7) + int(len(rows) * 0.1)
    return np.split(rows, [first, second])


# --- instructions and preferences


class Splits(NamedTuple, Generic[T]):
    """The records for training, the records for validation and the records for test."""

    train: list[T]
    val: list[T]
    test: list[T]


def split_records(
    settings: InstructConfig | PreferConfig | RewardConfig | RewardModelConfig | DistillConfig,
    seed: int,
    read: Callable[[str, list[str] | None], list[T]],
    made: Callable[..., list[T]],
    notes: list[str] | None = None,
) -> Splits[T]:
    """Split the records of the file settings.source, in file order, into training, test and validation records.

    As in "Build a Large Language Model (From Scratch)", the test records come before the validation records in the
    file. If settings.source is None, synthetic records are made instead of reading a file. The subjects of the
    synthetic records for validation and test (a word, "3 + 4", "7 meters") never occur in training.

    Args:
        read: function (source, notes) that returns the records in the file `source`, and appends lines of text about
            ignored keys to the list `notes`.
        made: function (n, seed, held_out) that returns n synthetic records. With held_out=True the records are about
            the subjects that are held out from training, see `is_held_out`.
        notes: list to which a line about ignored keys is appended, see `conversations.read`.
    """
    if settings.source is None:
        n = settings.examples
        shares = settings.val_fraction, settings.test_fraction
        n_val, n_test = (min(most, max(1, round(n * share))) for most, share in zip(HELD_OUT, shares, strict=True))
        unseen = made(n_val + n_test, seed, held_out=True)
        splits = Splits(made(n, seed), unseen[:n_val], unseen[n_val:])
        if not all(splits):
            raise UserError(f"examples={n} are too few for a test and a validation split: give more")
        return splits
    records = read(settings.source, notes)
    n = len(records)
    test = int(n * settings.test_fraction)
    train = int(n * (1 - settings.test_fraction - settings.val_fraction) + 1e-9)
    splits = Splits(records[:train], records[train + test :], records[train : train + test])
    if not all(splits):
        raise UserError(f"{settings.source}: {n} records are too few for a test and a validation split")
    return splits


def is_held_out(key: str) -> bool:
    """Returns whether a subject of synthetic questions (a word, "3 + 4", "7 meters") is held out from training."""
    return _hash(key)[0] % ONE_OF == 0


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
