"""Reads text lazily from files, folders, named assets and the Hugging Face hub; an invalid file raises an error.

A document has a name, a text and a group, which is the name of the file that the document came from. Document names are
relative to the path that the user gave. With relative names, the documents of a corpus have the same names on every
machine, and because the validation split depends on the document names, every machine holds out the same documents for
validation. The setting data.source may name these sources:

    shakespeare            a named asset (`gptjax.assets.ASSETS`), which takes precedence over a folder of the same
                           name: write ./shakespeare for the folder
    notes.txt  notes.md    one document
    folder/                its .txt and .md files at any depth; if there are none, its .jsonl, .csv and .parquet files
    rows.jsonl .csv .parquet   one document per row, in the column data.text_field
    hf:org/name[:config][@split]   rows of a dataset on the hub, loaded with the library `datasets`
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from gptjax import assets
from gptjax._moved import moved_name
from gptjax.config import DataConfig
from gptjax.errors import UserError, did_you_mean, did_you_mean_path
from gptjax.files import one_line_end, replacing, sha256, user_path
from gptjax.formats import tables

MAX_FILES = 1_000_000  # maximum number of files that a folder may contain


class Document(NamedTuple):
    """A document: its name within the source, its text, and the name of the file that contains the document
    (`group`)."""

    name: str
    text: str
    group: str


@dataclass(frozen=True)
class Source:
    """A data source, which is one entry of data.source. Every iteration over a data source reads the files again, so
    that the text is not kept in memory.

    Attributes:
        files        for each file, its name and a function that yields its documents
        fingerprint  hash of the file names and contents
    """

    name: str
    files: tuple[tuple[str, Callable[[], Iterator[Document]]], ...]
    fingerprint: str
    max_documents: int | None = None

    def __iter__(self) -> Iterator[Document]:
        return islice((document for _, read in self.files for document in read()), self.max_documents)


@dataclass(frozen=True)
class Documents:
    """All data sources of a data set, in the order of the setting data.source."""

    sources: tuple[Source, ...]

    def __iter__(self) -> Iterator[Document]:
        return (document for source in self.sources for document in source)


def documents(cfg: DataConfig, names: Iterable[str] | None = None) -> Documents:
    """Open the data sources that `names` lists, or the data sources in data.source if `names` is None.

    The files are hashed when the sources are opened, and the text of the files is read on iteration.

    Raises:
        UserError: sources do not exist or cannot be read; the message names all such sources.
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
    """Returns an error message if `name` is a file or folder that does not exist.

    Returns "" if the file or folder exists, or if `name` is an asset or a dataset on the hub.
    """
    if name.startswith("hf:") or name in assets.ASSETS or user_path(name, "data.source").exists():
        return ""
    texts = [key for key, asset in assets.ASSETS.items() if not asset.file.endswith((".bpe", ".gguf"))]
    hint = did_you_mean(name, texts) or did_you_mean_path(user_path(name, "data.source")) or "."
    return (
        f"data.source={name}: no such file, folder or asset{hint} "
        f"Assets: {', '.join(texts)}; other kinds: a .txt, .md, .jsonl, .csv or .parquet file, "
        "a folder, hf:org/name"
    )


def _open_path(name: str, path: Path, cfg: DataConfig) -> Source:
    files = _folder(name, path) if path.is_dir() else [(path.name, path)]
    unknown = [str(p) for _, p in files if p.suffix.lower() not in READERS]
    if unknown:
        hint = " (a file with one JSON object per line must be named .jsonl)" if unknown[0].endswith(".json") else ""
        raise UserError(f"data.source={name}: cannot read {unknown[0]}{hint}: known kinds are {', '.join(READERS)}")
    digest = hashlib.sha256()
    for relative, file in files:
        digest.update(f"{relative}\0{_hash_file(file)}\0".encode())
    readers = tuple(
        (relative, partial(READERS[file.suffix.lower()], file, relative, cfg.text_field)) for relative, file in files
    )
    return Source(name, readers, digest.hexdigest(), cfg.max_documents)


def _is_ours(folder: Path) -> bool:
    """Returns whether the folder is a run directory or a saved model that gptjax wrote."""
    return (folder / "model.json").is_file() or all((folder / f).is_file() for f in ("config.yaml", "metrics.jsonl"))


def _folder(name: str, folder: Path) -> list[tuple[str, Path]]:
    """Returns the name (relative to `folder`) and the path of each .txt and .md file in the folder and its subfolders.

    If the folder has no .txt or .md file, returns the names and paths of its .jsonl, .csv and .parquet files. Run
    directories and saved models of gptjax are skipped.
    """
    if _is_ours(folder):
        raise UserError(f"data.source={name} is a run or model of gptjax, not text: give text files or their folder")
    if folder.resolve() in (Path(folder.resolve().anchor), Path(os.path.expanduser("~")).resolve()):
        raise UserError(f"data.source={name}: {folder} is the root or home folder: give the folder or file of the text")
    visible: list[tuple[str, Path]] = []
    for path in _walk(name, folder, ()):
        if len(visible) >= MAX_FILES:
            raise UserError(f"data.source={name}: more than {MAX_FILES:,} files in {folder}: give a smaller folder")
        visible.append((path.relative_to(folder).as_posix(), path))
    visible.sort()
    for kinds in ((".txt", ".md"), (".jsonl", ".csv", ".parquet")):
        if files := [(relative, path) for relative, path in visible if path.suffix.lower() in kinds]:
            return files
    raise UserError(f"data.source={name}: no {', '.join(READERS)} file in {folder} ({len(visible)} other files)")


def _walk(name: str, folder: Path, parents: tuple[Path, ...]) -> Iterator[Path]:
    """Yields the paths of the files in a folder and its subfolders at any depth.

    Follows symbolic links. Hidden files, run directories of gptjax and saved models of gptjax are skipped.

    Raises:
        UserError: a symbolic link is broken, or leads back to a folder that contains it.
    """
    parents = (*parents, folder.resolve())
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_symlink() and (not path.exists() or path.resolve() in parents):
            target = "nowhere" if not path.exists() else "back to a folder that contains it"
            raise UserError(f"data.source={name}: {path} is a link that leads {target}: fix or remove it")
        if path.is_dir():
            if not _is_ours(path):
                yield from _walk(name, path, parents)
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
        text = tables.decode(file.read(), path)
    yield Document(name, one_line_end(text), name)


def _read_jsonl(path: Path, name: str, field: str) -> Iterator[Document]:
    for number, row in tables.jsonl(tables.lines(path)):
        location = f"{path}:{number}"
        if isinstance(row, json.JSONDecodeError):
            raise UserError(
                f"{location}:{row.colno}: not a complete JSON object ({row.msg}): each line must hold one"
            ) from row
        if isinstance(row, ValueError):
            raise UserError(f"{location}: {row}") from row
        if not isinstance(row, dict):
            raise UserError(f"{location}: each line must be a JSON object, found {tables.kind_of(row)}")
        yield Document(f"{name}:{number}", _field(row, field, location), name)


def _field(row: dict, field: str, location: str) -> str:
    if field not in row:
        raise UserError(_no_field(location, field, row))
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{location}: field {field!r} must be text, found {tables.kind_of(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{location}: field {field!r} holds a lone surrogate at character {error.start}") from error
    return text


def _no_field(location: str, field: str, fields: Iterable[str]) -> str:
    return f"{location}: no field {field!r}; fields: {tables.names(fields)}. Choose one with data.text_field=NAME"


def _read_csv(path: Path, name: str, field: str) -> Iterator[Document]:
    """Yields one document for each row of a CSV file with a header.

    All values of the CSV file are read as strings: NA and null are not read as missing values, and numbers are not
    converted.
    """
    header: list[str] = []
    for start, row in tables.delimited(tables.lines(path), strict=True):
        location = f"{path}:{start}"
        if isinstance(row, csv.Error):
            hint = " (a quote that is never closed?)" if "end of data" in str(row) else ""
            raise UserError(f"{location}: {row}{hint}") from row
        if not header:
            header = tables.header(row, location)
            if field not in header:
                raise UserError(_no_field(location, field, header))
        elif len(row) != len(header):
            column = min(len(row), len(header)) + 1
            raise UserError(f"{location}:{column}: {len(row)} columns, and the header has {len(header)}")
        else:
            yield Document(f"{name}:{start}", row[header.index(field)], name)
    if not header:
        raise UserError(f"{path}: empty; a header line with a column {field!r} was expected")


def _read_parquet(path: Path, name: str, field: str) -> Iterator[Document]:
    def columns(schema: Any) -> list[str]:
        if field not in schema.names:
            raise UserError(_no_field(str(path), field, schema.names))
        kind = schema.field(field).type
        if not _is_text(kind):
            raise UserError(f"{path}: column {field!r} must be text, found {kind}")
        return [field]

    for number, row in enumerate(tables.parquet(path, str(path), columns), 1):
        if row[field] is None:
            raise UserError(f"{path}: row {number}: column {field!r} is null")
        yield Document(f"{name}:{number}", row[field], name)


def _is_text(kind: Any) -> bool:
    """Returns whether an Arrow column is text: string, large_string or string_view, or dictionary-encoded text."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pa.string(), pa.large_string(), getattr(pa, "string_view", pa.string)())


READERS: dict[str, Callable[[Path, str, str], Iterator[Document]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


# --- Hugging Face hub


def _open_hub(name: str, cfg: DataConfig) -> Source:
    """Open a dataset on the Hugging Face hub, hf:org/name[:config][@split]; the default split is train.

    With data.streaming=true only the first data.max_documents rows are downloaded, and are stored as .jsonl in the
    cache folder, so that a rerun reads the same text and needs no network.
    """
    repo, config, split = tables.hub_name(name)
    if cfg.streaming:
        path = _cached_rows(name, repo, config, split, cfg)
        read = partial(_read_jsonl, path, repo, "text")
        return Source(name, ((repo, read),), _hash_file(path), cfg.max_documents)
    dataset = _load(name, repo, config, split, cfg)
    version = getattr(dataset, "_fingerprint", None) or repr(dataset)
    fingerprint = hashlib.sha256(f"{name}\0{cfg.text_field}\0{version}".encode()).hexdigest()
    read = partial(_documents, dataset, name, repo, cfg.text_field)
    return Source(name, ((repo, read),), fingerprint, cfg.max_documents)


def _load(name: str, repo: str, config: str, split: str, cfg: DataConfig) -> Any:
    try:
        dataset = tables.hub(repo, config, split, streaming=cfg.streaming)
    # The library `datasets` raises exceptions of many types if the network is missing or the name is unknown.
    except Exception as error:
        raise _hub_error(name, error) from error
    columns = getattr(dataset, "column_names", None)
    if columns is not None and cfg.text_field not in columns:
        raise UserError(_no_field(f"data.source={name}", cfg.text_field, columns))
    return dataset


def _documents(dataset: Any, name: str, repo: str, field: str) -> Iterator[Document]:
    try:
        for number, row in enumerate(dataset.select_columns([field]), 1):
            yield Document(f"{repo}:{number}", _field(row, field, f"data.source={name}: row {number}"), repo)
    except UserError:
        raise
    except Exception as error:
        raise _hub_error(name, error) from error


def _cached_rows(name: str, repo: str, config: str, split: str, cfg: DataConfig) -> Path:
    key = hashlib.sha256(f"{name}\0{cfg.text_field}\0{cfg.max_documents}".encode()).hexdigest()[:32]
    path = cache_root(cfg) / "hf" / f"{key}.jsonl"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as out:
            rows = _documents(_load(name, repo, config, split, cfg), name, repo, cfg.text_field)
            for document in islice(rows, cfg.max_documents):
                out.write(json.dumps({"text": document.text}).encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot store the rows of {name} in {path.parent}: {error.strerror or error}") from error
    return path


def _hub_error(name: str, error: Exception) -> UserError:
    reason = tables.first_line(error.__cause__ if type(error).__name__ == "DatasetGenerationError" else error)
    return UserError(
        f"data.source={name}: {type(error).__name__}: {reason}\n"
        "  check the name and the network (and HF_TOKEN for a gated dataset), or use local text: "
        "data.source=FILE, or data.source=shakespeare"
    )


def cache_root(cfg: DataConfig) -> Path:
    """Returns the cache folder for encoded tokens and downloaded rows: data.cache_dir, or by default the user's cache
    folder."""
    return Path(cfg.cache_dir).expanduser() if cfg.cache_dir else assets.cache_dir()


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
