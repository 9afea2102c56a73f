"""Text from files, folders, named assets and the Hugging Face hub, read strictly and lazily.

A document is a (name, text, group): group is the file it came from. Names are relative to what the user
gave, so the same corpus has the same names, and the same held-out part, on every machine.

    shakespeare            a named asset (`gptjax.assets.ASSETS`); these names win, write ./shakespeare for a folder
    notes.txt  notes.md    one document
    folder/                its .txt and .md at any depth; where there are none, its .jsonl, .csv and .parquet
    rows.jsonl .csv .parquet   one document a row, in the column data.text_field
    hf:org/name[:config][@split]   rows of a dataset, through `datasets`
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax import assets
from gptjax.config import DataConfig
from gptjax.errors import UserError, did_you_mean
from gptjax.files import one_line_end, other_encoding, replacing, sha256, user_path
from gptjax.formats import json as strict_json

MAX_FIELD_CHARACTERS = 1 << 30  # of one CSV cell; the csv module stops at 131,072 by default
MAX_PROBLEMS = 10
MAX_FILES = 1_000_000  # of a folder
BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    name: str
    text: str
    group: str


@dataclass(frozen=True)
class Source:
    """One entry of data.source. Every iteration reads the files again; no text is kept."""

    name: str
    files: tuple[tuple[str, Callable[[], Iterator[Document]]], ...]
    fingerprint: str
    max_documents: int | None = None

    def __iter__(self) -> Iterator[Document]:
        return islice((document for _, read in self.files for document in read()), self.max_documents)


@dataclass(frozen=True)
class Documents:
    """All sources of a split, in the order given."""

    sources: tuple[Source, ...]

    def __iter__(self) -> Iterator[Document]:
        return (document for source in self.sources for document in source)


def documents(cfg: DataConfig, names: Iterable[str] | None = None) -> Documents:
    """Open data.source, or other `names` of the same kinds. Files are hashed here and read when iterated.

    Raises:
        UserError: what is missing or of no known kind, all at once.
    """
    names = cfg.source if names is None else names
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names:
        raise UserError("data.source is empty: name an asset, a file, a folder or hf:org/name")
    if cfg.max_documents is not None and cfg.max_documents < 1:
        raise UserError(f"data.max_documents ({cfg.max_documents}) must be at least 1")
    opened, problems = [], []
    for name in names:
        try:
            opened.append(_open(name, cfg))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError.all(problems)
    return Documents(tuple(opened))


def _open(name: str, cfg: DataConfig) -> Source:
    if name.startswith("hf:"):
        return _open_hub(name, cfg)
    if name in assets.ASSETS:
        return _open_path(name, assets.fetch(name), cfg)
    if problem := missing(name):
        raise UserError(problem)
    return _open_path(name, user_path(name, "data.source"), cfg)


def missing(name: str) -> str:
    """What to say of a source that is not there; nothing of one that is, or that would be fetched."""
    if name.startswith("hf:") or name in assets.ASSETS or user_path(name, "data.source").exists():
        return ""
    hint = did_you_mean(name, assets.ASSETS, " Did you mean {!r}?")
    return (
        f"data.source={name}: no such file, folder or asset.{hint} "
        f"Assets: {', '.join(assets.ASSETS)}; other kinds: a .txt, .md, .jsonl, .csv or .parquet file, "
        "a folder, hf:org/name"
    )


def _open_path(name: str, path: Path, cfg: DataConfig) -> Source:
    files = _folder(name, path) if path.is_dir() else [(path.name, path)]
    unknown = [str(p) for _, p in files if p.suffix.lower() not in READERS]
    if unknown:
        hint = " (one JSON object a line is .jsonl)" if unknown[0].endswith(".json") else ""
        raise UserError(f"data.source={name}: cannot read {unknown[0]}{hint}: known kinds are {', '.join(READERS)}")
    digest = hashlib.sha256()
    for relative, file in files:
        digest.update(f"{relative}\0{_hash_file(file)}\0".encode())
    readers = tuple((r, partial(READERS[p.suffix.lower()], p, r, cfg.text_field)) for r, p in files)
    return Source(name, readers, digest.hexdigest(), cfg.max_documents)


def _is_ours(folder: Path) -> bool:
    """Whether it is a run directory or a model folder."""
    return (folder / "model.json").is_file() or all((folder / f).is_file() for f in ("config.yaml", "metrics.jsonl"))


def _folder(name: str, folder: Path) -> list[tuple[str, Path]]:
    """Its text files, else its tables; what runs of gptjax wrote below it is no text of the user's."""
    if _is_ours(folder):
        raise UserError(f"data.source={name} is a run or model of gptjax, not text: name text files or their folder")
    if folder.resolve() in (Path(folder.resolve().anchor), Path(os.path.expanduser("~")).resolve()):
        raise UserError(f"data.source={name}: {folder} holds everything there is: name the folder or file of the text")
    visible = sorted((path.relative_to(folder).as_posix(), path) for path in _visible(name, folder))
    for kinds in ((".txt", ".md"), (".jsonl", ".csv", ".parquet")):
        if files := [(r, p) for r, p in visible if p.suffix.lower() in kinds]:
            return files
    raise UserError(f"data.source={name}: no {', '.join(READERS)} file in {folder} ({len(visible)} other files)")


def _visible(name: str, folder: Path) -> Iterator[Path]:
    """The files at any depth, through links too, without hidden ones and what runs of gptjax wrote.

    Raises:
        UserError: too many files; a link that leads nowhere, or back to a folder that it stands in.
    """
    for count, path in enumerate(_walk(name, folder, ())):
        if count >= MAX_FILES:
            raise UserError(f"data.source={name}: more than {MAX_FILES:,} files in {folder}: name a smaller folder")
        yield path


def _walk(name: str, folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    above = (*above, folder.resolve())
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_symlink() and (not path.exists() or path.resolve() in above):
            where = "nowhere" if not path.exists() else "back to a folder that it stands in"
            raise UserError(f"data.source={name}: {path} is a link that leads {where}: mend it or take it out")
        if path.is_dir():
            if not _is_ours(path):
                yield from _walk(name, path, above)
        elif path.is_file():
            yield path


def _hash_file(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


# --- files


def _read_text(path: Path, name: str, field: str) -> Iterator[Document]:
    with open(path, "rb") as file:
        text = _decode(file.read(), path)
    yield Document(name, one_line_end(text), name)


def _decode(data: bytes, path: Path, at: int = 0) -> str:
    """UTF-8 without a byte order mark; `at` is where `data` begins in the file."""
    if at == 0 and (other := other_encoding(data)):
        raise UserError(f"{path}: {other}")
    if (nul := data.find(b"\0")) >= 0:
        raise UserError(f"{path}: a NUL byte at byte {at + nul}: not UTF-8 text (UTF-16? convert it with iconv)")
    try:
        return (data.removeprefix(BOM) if at == 0 else data).decode("utf-8")
    except UnicodeDecodeError as error:
        at += error.start + (len(BOM) if at == 0 and data.startswith(BOM) else 0)
        raise UserError(
            f"{path}: invalid UTF-8 at byte {at} (0x{error.object[error.start]:02x}, {error.reason}): "
            "convert the file from the encoding it has, for example with iconv -f windows-1252 -t utf-8 FILE > NEW"
        ) from error


def lines(path: Path) -> Iterator[str]:
    """Lines with their ends, cut at line feeds alone (str.splitlines would also cut at U+2028), or at the carriage
    returns of a file of an old Mac, which has no line feed."""
    at = 0
    with open(path, "rb") as file:
        for line in file:
            text = _decode(line, path, at)
            if at == 0 and not text.endswith("\n") and "\r" in text:
                yield from (f"{part}\n" for part in one_line_end(text).removesuffix("\n").split("\n"))
            else:
                yield text
            at += len(line)


def _read_jsonl(path: Path, name: str, field: str) -> Iterator[Document]:
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = strict_json.loads(line, constants=False)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}:{error.colno}: not a complete JSON object ({error.msg}): each line must hold one"
            ) from error
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: each line must be a JSON object, found {kind_of(row)}")
        yield Document(f"{name}:{number}", _field(row, field, where), name)


def _field(row: dict, field: str, where: str) -> str:
    if field not in row:
        raise UserError(_no_field(where, field, row))
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} must be text, found {kind_of(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {field!r} holds a lone surrogate at character {error.start}") from error
    return text


def _no_field(where: str, field: str, fields: Iterable[str]) -> str:
    return f"{where}: no field {field!r}; fields: {names(fields)}. Choose one with data.text_field=NAME"


def names(keys: Iterable[object]) -> str:
    """Keys or columns in a row, each in quotes where its blanks, or a comma, would mislead."""
    keys = list(keys)
    more = f" and {len(keys) - 20:,} more" if len(keys) > 20 else ""
    return ", ".join(map(quoted, keys[:20])) + more


def quoted(key: object) -> str:
    name = str(key)[:80]
    return name if name and name.strip() == name and name.isprintable() and "," not in name else repr(name)


def kind_of(value: object) -> str:
    names = {type(None): "null", list: "an array", dict: "an object", str: "a string", bool: "true or false"}
    return names.get(type(value), "a number")


def _read_csv(path: Path, name: str, field: str) -> Iterator[Document]:
    """Rows of a CSV with a header. Nothing is guessed: NA and null stay text, numbers stay as written."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_CHARACTERS))
    rows = csv.reader(lines(path), strict=True)
    header: list[str] | None = None
    while True:
        start = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            hint = " (a quote that is never closed?)" if "end of data" in str(error) else ""
            raise UserError(f"{path}:{start}: {error}{hint}") from error
        if row is None:
            break
        if not row:
            continue
        if header is None:
            header = _header(row, f"{path}:{start}", field)
        elif len(row) != len(header):
            column = min(len(row), len(header)) + 1
            raise UserError(f"{path}:{start}:{column}: {len(row)} columns, and the header has {len(header)}")
        else:
            yield Document(f"{name}:{start}", row[header.index(field)], name)
    if header is None:
        raise UserError(f"{path}: empty; a header line with a column {field!r} was expected")


def _header(row: list[str], where: str, field: str) -> list[str]:
    twice = sorted(column for column, count in Counter(row).items() if count > 1 and column.strip())
    if twice:  # columns without a name may be several: nobody can ask for one
        raise UserError(f"{where}: column {twice[0]!r} appears twice in the header")
    if field not in row:
        raise UserError(_no_field(where, field, row))
    return row


def _read_parquet(path: Path, name: str, field: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if field not in schema.names:
                raise UserError(_no_field(str(path), field, schema.names))
            kind = schema.field(field).type
            if not _is_text(kind):
                raise UserError(f"{path}: column {field!r} must be text, found {kind}")
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if text is None:
                        raise UserError(f"{path}: row {number}: column {field!r} is null")
                    yield Document(f"{name}:{number}", text, name)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file: {first_line(error)}") from error


def _is_text(kind: Any) -> bool:
    """Whether a column of arrow is text, of whichever layout; one of few different values is kept as a dictionary."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pa.string(), pa.large_string(), getattr(pa, "string_view", pa.string)())


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


READERS: dict[str, Callable[[Path, str, str], Iterator[Document]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


# --- the Hugging Face hub


def _open_hub(name: str, cfg: DataConfig) -> Source:
    """hf:org/name[:config][@split], split train by default.

    data.streaming=true downloads no more than the first data.max_documents rows. They are kept as .jsonl in
    the cache folder, so a rerun reads the same text and needs no network.
    """
    repo, config, split = hub_name(name)
    if cfg.streaming:
        path = _keep_rows(name, partial(_hub_rows, name, repo, config, split, cfg), cfg)
        read = partial(_read_jsonl, path, repo, "text")
        return Source(name, ((repo, read),), _hash_file(path), cfg.max_documents)
    dataset = _load(name, repo, config, split, cfg)
    mark = getattr(dataset, "_fingerprint", None) or repr(dataset)
    fingerprint = hashlib.sha256(f"{name}\0{cfg.text_field}\0{mark}".encode()).hexdigest()
    read = partial(_documents, dataset, name, repo, cfg.text_field)
    return Source(name, ((repo, read),), fingerprint, cfg.max_documents)


def hub_name(name: str) -> tuple[str, str, str]:
    """(org/name, config, split) of hf:org/name[:config][@split]; the last two may be empty.

    Raises:
        UserError: it has another form, or a folder here has that name, which `datasets` would read instead.
    """
    repo, _, split = name.removeprefix("hf:").partition("@")
    repo, _, config = repo.partition(":")
    plain = r"[A-Za-z0-9][\w.-]{0,95}"
    if not re.fullmatch(f"{plain}/{plain}", repo, re.ASCII) or ".." in repo:
        raise UserError(f"{name:.200}: expected hf:org/name, hf:org/name:config or hf:org/name:config@split")
    if Path(repo).exists():
        raise UserError(f"{name}: {repo} is a folder or file here: give its path without hf:, or start elsewhere")
    return repo, config, split


def _load(name: str, repo: str, config: str, split: str, cfg: DataConfig):
    try:
        import datasets

        dataset = datasets.load_dataset(repo, config or None, split=split or "train", streaming=cfg.streaming)
    except Exception as error:  # no network, no such name, no such config: all of them are the user's to mend
        raise _hub_error(name, error) from error
    columns = getattr(dataset, "column_names", None)
    if columns is not None and cfg.text_field not in columns:
        raise UserError(_no_field(f"data.source={name}", cfg.text_field, columns))
    return dataset


def _documents(dataset, name: str, repo: str, field: str) -> Iterator[Document]:
    try:
        for number, row in enumerate(dataset.select_columns([field]), 1):
            yield Document(f"{repo}:{number}", _field(row, field, f"data.source={name}: row {number}"), repo)
    except UserError:
        raise
    except Exception as error:
        raise _hub_error(name, error) from error


def _hub_rows(name: str, repo: str, config: str, split: str, cfg: DataConfig) -> Iterator[Document]:
    dataset = _load(name, repo, config, split, cfg)
    return islice(_documents(dataset, name, repo, cfg.text_field), cfg.max_documents)


def _keep_rows(name: str, rows: Callable[[], Iterator[Document]], cfg: DataConfig) -> Path:
    key = hashlib.sha256(f"{name}\0{cfg.text_field}\0{cfg.max_documents}".encode()).hexdigest()[:32]
    path = cache_root(cfg) / "hf" / f"{key}.jsonl"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as out:
            for document in rows():
                out.write(json.dumps({"text": document.text}).encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot keep the rows of {name} in {path.parent}: {error.strerror or error}") from error
    return path


def _hub_error(name: str, error: Exception) -> UserError:
    reason = first_line(error.__cause__ if type(error).__name__ == "DatasetGenerationError" else error)
    return UserError(
        f"data.source={name}: {type(error).__name__}: {reason}\n"
        "  check the name and the network (and HF_TOKEN for a gated dataset), or use local text: "
        "data.source=FILE, or data.source=shakespeare"
    )


def cache_root(cfg: DataConfig) -> Path:
    return Path(cfg.cache_dir).expanduser() if cfg.cache_dir else assets.cache_dir()


# --- held-out text


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


def split(found: Documents, cfg: DataConfig) -> tuple[Part, Part, list[dict]]:
    """(train, val, how), each source by itself, so that val speaks for all of them.

    tail      the last val_fraction of the characters of each file
    document  whole documents: in the order of a hash of their names, until the bytes come nearest to
              val_fraction. Neither the seed nor the order matters, so runs with other seeds compare.
    file      the same with whole files
    auto      document where there are 10 or more, else tail
    `how` says for each source what was done: source, split, documents, bytes and the names held_out (the first 100).
    """
    if not 0 < cfg.val_fraction < 1:
        raise UserError(f"data.val_fraction ({cfg.val_fraction}) must be between 0 and 1, or give data.val_source")
    cuts, how = zip(*(_cut(source, cfg) for source in found.sources), strict=True)
    n = sum(part["documents"] for part in how)
    return Part(found, n, cuts), Part(found, n, cuts, held_out=True), list(how)


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


def _cut(source: Source, cfg: DataConfig) -> tuple[np.ndarray, dict]:
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
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode("utf-8", "replace")).digest())
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
