"""What is held out, of every kind of data.

split_documents   pretraining           the tail of each file, whole documents or whole files; or another source
split_labelled    classification        by class, by equal texts, or as the book does it
split_records     instructions, pairs   the end of a file in its order; of synthetic skills what `is_held_out` says
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from gptjax.config import DataConfig, InstructConfig, PreferConfig
from gptjax.data.sources import Document, Documents, Source
from gptjax.errors import UserError

if TYPE_CHECKING:
    from gptjax.data.classification import Labelled

T = TypeVar("T")
MAX_PROBLEMS = 10
BOOK_SEED = 123
HELD_OUT = 80, 200  # at most so many synthetic questions to validate and test on: they are answered one by one
ONE_OF = 5  # of so many words of the synthetic skills one is held out


# --- pretraining


@dataclass(frozen=True)
class Part:
    """The training or the held-out part of documents. cuts[k][i]: characters of document i that are for training.

    n_documents counts those of all sources, before the split.
    """

    documents: Documents
    n_documents: int
    cuts: tuple[np.ndarray, ...] | None = None  # None: all of it
    held_out: bool = False

    def __iter__(self) -> Iterator[Document]:
        return (document for k in range(len(self.documents.sources)) for document, *_ in self.source(k))

    def source(self, k: int) -> Iterator[tuple[Document, bool, bool]]:
        """(document, whether its text begins here, whether it ends here) of source k.

        A tail that was cut off does not begin, what it was cut from does not end. A corpus that is one running text
        does neither: its single beginning and end could never be learnt.
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


def split_documents(found: Documents, cfg: DataConfig, val: Documents | None = None) -> tuple[Part, Part, list[dict]]:
    """(train, val, how), each source by itself, so that val speaks for all of them.

    tail      the last val_fraction of the characters of each file
    document  whole documents: in the order of a hash of their names, until the bytes come nearest to
              val_fraction. Neither the seed nor the order matters, so runs with other seeds compare.
    file      the same with whole files
    auto      document where there are 10 or more, else tail
    none      all of it: `val` is given, the documents of data.val_source
    `how` says for each source what was done: source, split, documents, bytes and the names held_out (the first 100).
    """
    if val is not None:
        how, counts = [], [0, 0]
        for i, documents in enumerate((found, val)):
            for source in documents.sources:
                sizes = measure(source)
                counts[i] += len(sizes.names)
                size = {"documents": len(sizes.names), "bytes": int(sizes.bytes.sum())}
                how.append({"source": source.name, "split": "none", **size})
        return Part(found, counts[0]), Part(val, counts[1]), how
    if not 0 < cfg.val_fraction < 1:
        raise UserError(f"data.val_fraction ({cfg.val_fraction}) must be between 0 and 1, or give data.val_source")
    cuts, ways = zip(*(_cut(source, cfg) for source in found.sources), strict=True)
    n = sum(way["documents"] for way in ways)
    return Part(found, n, cuts), Part(found, n, cuts, held_out=True), list(ways)


class Sizes(NamedTuple):
    """One number a document: length, and the file it is in."""

    names: list[str]
    characters: np.ndarray
    bytes: np.ndarray
    groups: np.ndarray


def measure(source: Source) -> Sizes:
    """One pass over the text, which also finds what is wrong with it: up to 10 files at once.

    Raises:
        UserError: unreadable files, or a source without text.
    """
    names: list[str] = []
    sizes: list[tuple[int, int, int]] = []
    problems: list[str] = []
    for group, (_, read) in enumerate(source.files):
        room = None if source.max_documents is None else source.max_documents - len(names)
        try:
            for document in islice(read(), room):
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
    way = cfg.split if cfg.split != "auto" else ("document" if n >= 10 else "tail")
    how = {"source": source.name, "split": way, "documents": n, "bytes": int(sizes.bytes.sum())}
    if way == "tail":
        cuts = _tail_cuts(sizes, cfg.val_fraction)
        held = [sizes.names[i] for i in np.flatnonzero(cuts < sizes.characters)[:100]]
        return cuts, {**how, "held_out": held}
    if way == "document":
        units, names = np.arange(n), sizes.names
    else:
        kept, units = np.unique(sizes.groups, return_inverse=True)
        names = [source.files[g][0] for g in kept]
    if len(names) < 2:
        raise UserError(
            f"data.split={way} needs at least 2 {way}s in data.source={source.name}, found {len(names)}: "
            "use data.split=tail"
        )
    chosen = hold_out(names, np.bincount(units, sizes.bytes, len(names)), cfg.val_fraction)
    cuts = np.where(chosen[units], 0, sizes.characters)
    held = [names[i] for i in np.flatnonzero(chosen)[:100]]
    return cuts, {**how, "held_out": held}


def _tail_cuts(sizes: Sizes, fraction: float) -> np.ndarray:
    """int((1 - fraction) * characters) of each file are for training, whichever document that falls in."""
    totals = np.bincount(sizes.groups, sizes.characters) if len(sizes.names) else np.zeros(1)
    begin = np.cumsum(sizes.characters) - sizes.characters
    first = np.r_[0, np.cumsum(totals)][sizes.groups]
    cut = np.floor(round(1 - fraction, 12) * totals)[sizes.groups]
    return np.clip(cut - (begin - first), 0, sizes.characters).astype(np.int64)


def hold_out(names: list[str], sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Which of `names` to hold out, [n] bool: at least one, never all."""
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
    """`leaked`: how many texts of val and test stand in train as well."""

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
    """Train, validation and test texts.

    stratified  each class in these fractions
    grouped     equal texts never in two parts, also where deduplicate is off
    book        chapter 6 of the book: balanced, shuffled and cut as pandas does it with its seed; fractions are its

    Args:
        deduplicate: of texts that are equal but for case and blanks only the first counts. Not with `book`, unless
            asked for: then what stands in train is taken out of val and test, and repetitions out of each.

    Raises:
        UserError: a part that would be empty, or lack a class to train on.
    """
    seen: set[str] = set()
    if how == "book":
        parts = [data.take(rows) for rows in _book(data)]
        if deduplicate:
            parts = [part.take(_fresh(part.texts, seen)) for part in parts]
    else:
        if deduplicate:
            data = data.take(_fresh(data.texts, seen))
        divide = _grouped if how == "grouped" else _stratified
        parts = [data.take(rows) for rows in divide(data, fractions, np.random.default_rng(seed))]
    for name, part in zip(("train", "validate", "test"), parts, strict=True):
        if not part.texts:
            raise UserError(f"{len(data.texts)} texts leave none to {name} on: give more, or other fractions")
    train, val, test = parts
    lacking = [train.names[k] for k in range(len(data.names)) if not (train.labels == k).any()]
    if lacking:
        raise UserError(f"no text to train on is of class {', '.join(lacking)}: give more texts of it")
    known = {normalized(text) for text in train.texts}
    return LabelledSplits(train, val, test, sum(normalized(text) in known for text in (*val.texts, *test.texts)))


def normalized(text: str) -> str:
    """Without what does not make another text of it: case, and how many blanks stand where."""
    return " ".join(text.casefold().split())


def _fresh(texts: Sequence[str], seen: set[str]) -> list[int]:
    """Rows whose text is not in `seen` yet, which grows."""
    rows = []
    for i, text in enumerate(texts):
        if (key := normalized(text)) not in seen:
            seen.add(key)
            rows.append(i)
    return rows


def _stratified(data: Labelled, fractions: Sequence[float], rng: np.random.Generator) -> list[np.ndarray]:
    parts: list[list[np.ndarray]] = [[], [], []]
    for k in range(len(data.names)):
        rows = rng.permutation(np.flatnonzero(data.labels == k))
        ends = np.round(np.cumsum(fractions)[:2] * len(rows)).astype(int)
        for part, some in zip(parts, np.split(rows, ends), strict=True):
            part.append(some)
    return [np.sort(np.concatenate(part)) for part in parts]


def _grouped(data: Labelled, fractions: Sequence[float], rng: np.random.Generator) -> list[np.ndarray]:
    groups: dict[str, list[int]] = {}
    for i, text in enumerate(data.texts):
        groups.setdefault(normalized(text), []).append(i)
    order = [list(groups.values())[i] for i in rng.permutation(len(groups))]
    edges = np.cumsum(fractions)[:2] * len(data.texts)
    parts: list[list[int]] = [[], [], []]
    done = 0
    for group in order:
        parts[int(np.searchsorted(edges, done, "right"))] += group
        done += len(group)
    return [np.sort(np.array(part, int)) for part in parts]


def _book(data: Labelled) -> list[np.ndarray]:
    """The common class sampled down, the rare one below it, all shuffled, cut at 70 and 80 per cent.

    Source: the book's ch06 code, pandas calls and seed.
    """
    import pandas

    counts = np.bincount(data.labels, minlength=len(data.names))
    if len(data.names) != 2 or counts[0] == counts[1]:
        raise UserError(
            f"split=book is for two classes of different size, as ham and spam: there are {counts.tolist()}"
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
    """Records to train, validate and test on."""

    train: list[T]
    val: list[T]
    test: list[T]


def split_records(
    settings: InstructConfig | PreferConfig,
    seed: int,
    read: Callable[[str, list[str] | None], list[T]],
    made: Callable[..., list[T]],
    notes: list[str] | None = None,
) -> Splits[T]:
    """Of a file in its order: what is trained on, then test, then validation, as the book cuts it. Of the synthetic
    skills: test and validation ask about words and numbers that training never shows.

    Args:
        made: (n, seed, held_out) -> records.
        notes: as of `conversations.read`.
    """
    if settings.source is None:
        n = settings.examples
        shares = settings.val_fraction, settings.test_fraction
        held = [min(most, max(1, round(n * share))) for most, share in zip(HELD_OUT, shares, strict=True)]
        unseen = made(sum(held), seed, held_out=True)
        parts = Splits(made(n, seed), unseen[: held[0]], unseen[held[0] :])
        if not all(parts):
            raise UserError(f"examples={n} are too few for a part to test and one to validate on: give more")
        return parts
    records = read(settings.source, notes)
    n = len(records)
    test = int(n * settings.test_fraction)
    train = int(n * (1 - settings.test_fraction - settings.val_fraction) + 1e-9)
    parts = Splits(records[:train], records[train + test :], records[train : train + test])
    if not all(parts):
        raise UserError(f"{settings.source}: {n} records are too few for a part to test and one to validate on")
    return parts


def is_held_out(key: str) -> bool:
    """Whether a word, "3 + 4", "9 - 2" or "7 meters" of the synthetic skills is for testing only."""
    return _hash(key)[0] % ONE_OF == 0
