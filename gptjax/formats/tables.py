"""Readers of tabular data: .json (an array), .jsonl, .csv, .tsv and .parquet files, and Hugging Face hub datasets.

`read` yields whole records. For an invalid record, `read` yields a UserError instead of raising an error, so that
callers can report all invalid records at once. `jsonl`, `delimited`, `parquet` and `hub` are lower-level functions, for
callers that read a single column or report errors in more detail.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from gptjax.errors import UserError, did_you_mean_path
from gptjax.files import one_line_end, other_encoding, user_path
from gptjax.formats import json as strict_json

KINDS = (".json", ".jsonl", ".parquet", ".csv")
TEXT = ("text", "sentence", "content", "review", "message", "sms", "body", "comment", "document")
LABEL = ("label", "labels", "class", "category", "target", "sentiment", "intent")
# Maximum number of characters per CSV cell, because the default of the module csv, 131,072, is too small.
MAX_FIELD_CHARACTERS = 1 << 30
BOM = b"\xef\xbb\xbf"

Record = dict[str, Any]
Records = Iterator[tuple[str, Record | UserError]]  # iterator over pairs (location, record), see `read`


# --- whole records


def read(source: str) -> Records:
    """Yield (location, record) for each record of a .json (array), .jsonl, .parquet or .csv file, or of the Hugging
    Face dataset hf:org/name[:config][@split].

    In place of an invalid record, the function yields a UserError that describes the problem.

    Raises:
        UserError: the file does not exist or has none of these extensions, or the file or dataset cannot be read.
    """
    if source.startswith("hf:"):
        return _hub_records(source)
    path = user_path(source)
    reader = {".json": _json, ".jsonl": _jsonl, ".parquet": _parquet, ".csv": _csv}.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{source}: expected a {', '.join(KINDS)} file or hf:org/name")
    if not path.is_file():
        raise UserError(f"{source}: no such file{did_you_mean_path(path)}")
    return reader(path, source)


def loads(text: str) -> Any:
    """Parse a JSON value strictly: duplicate keys and NaN are errors. If the text is not valid JSON, a UserError is
    returned."""
    try:
        return strict_json.loads(text, constants=False)
    except ValueError as error:
        return _no_json(error)


def _no_json(error: ValueError) -> UserError:
    return UserError(f"not valid JSON: {error}" if isinstance(error, JSONDecodeError) else str(error))


def _json(path: Path, source: str) -> Records:
    records = loads("".join(lines(path)))
    if not isinstance(records, list):
        hint = " (a file with one object per line is .jsonl)" if isinstance(records, UserError) else ""
        what = f"{records}{hint}" if hint else f"expected an array of records, found {kind_of(records)}"
        raise UserError(f"{source}: {what}")
    for number, record in enumerate(records, 1):
        wrong = UserError(f"expected an object, found {kind_of(record)}")
        yield f"{source}: record {number}", record if isinstance(record, dict) else wrong


def _jsonl(path: Path, source: str) -> Records:
    for number, value in jsonl(lines(path)):
        if isinstance(value, ValueError):
            value = _no_json(value)
        elif not isinstance(value, dict):
            value = UserError(f"expected a JSON object, found {kind_of(value)}")
        yield f"{source}:{number}", value


def _csv(path: Path, source: str) -> Records:
    """Yields (location, record) for each row of a .csv file. All values in a record of a .csv file are strings, even
    NA, null and numbers."""
    columns: list[str] = []
    for number, row in delimited(lines(path), strict=True):
        location = f"{source}:{number}"
        if isinstance(row, csv.Error):
            yield location, UserError(f"{row} (a quote that is never closed?)")
        elif not columns:
            columns = header(row, location)
        elif len(row) != len(columns):
            yield location, UserError(f"{len(row)} columns, and the header has {len(columns)}")
        else:
            yield location, dict(zip(columns, row, strict=True))


def tsv(source: str, quoted: bool = False) -> Records:
    """Yields (location, record) for each row of a .tsv file; in place of an invalid row, the function yields a
    UserError.

    The first row of a .tsv file counts as a header if it contains a name from TEXT and a name from LABEL. A .tsv file
    without a header must have two columns, label and text.

    Args:
        quoted: True: a cell that begins with a quote ends at the closing quote, which may be on a later line, as in
            pandas. False: quotes are ordinary characters.
    """
    path = user_path(source)
    if not path.is_file():
        raise UserError(f"{source}: no such file{did_you_mean_path(path)}")
    columns: list[str] = []
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    for number, row in delimited(lines(path), delimiter="\t", quoting=quoting):
        location = f"{source}:{number}"
        if isinstance(row, csv.Error):
            yield location, UserError(str(row))
            continue
        if not columns:
            titles = [name.strip().lower() for name in row]
            has_header = any(title in TEXT for title in titles) and any(title in LABEL for title in titles)
            if not has_header and len(row) != 2:
                raise UserError(f"{source}:1: expected a header or two columns, label and text; got {len(row)} columns")
            columns = row if has_header else ["label", "text"]
            if has_header:
                continue
        complete = len(row) == len(columns)
        problem = UserError(f"{len(row)} columns, expected {len(columns)} ({names(columns)})")
        yield location, dict(zip(columns, row, strict=True)) if complete else problem


def _parquet(path: Path, source: str) -> Records:
    return ((f"{source}: row {number}", record) for number, record in enumerate(parquet(path, source), 1))


def _hub_records(source: str) -> Records:
    repo, config, split = hub_name(source)
    try:
        records = list(hub(repo, config, split))
    # Every error of the library `datasets` is converted to a UserError, because the user can fix most of these errors,
    # such as an unknown dataset name.
    except Exception as error:
        raise UserError(
            f"{source}: {type(error).__name__}: {first_line(error)}\n"
            "  check the name (hf:org/name[:config][@split]) and the network, or give a local file"
        ) from error
    for number, record in enumerate(records, 1):
        yield f"{source}: record {number}", record


# --- lower-level readers


def lines(path: Path) -> Iterator[str]:
    """Yields the lines of a text file; each line includes its line end.

    A text file is split at line feeds only, not with str.splitlines, which splits at characters such as U+2028 too. A
    file without line feeds is split at carriage returns, the line ends of classic Mac OS.
    """
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            text = decode(line, path, offset)
            if offset == 0 and not text.endswith("\n") and "\r" in text:
                yield from (f"{mac_line}\n" for mac_line in one_line_end(text).removesuffix("\n").split("\n"))
            else:
                yield text
            offset += len(line)


def decode(data: bytes, path: Path, offset: int = 0) -> str:
    """Decode a part of a UTF-8 file, and remove the byte order mark at the start of the file, if there is one.

    `offset` is the byte position of `data` in the file.
    """
    if offset == 0 and (other := other_encoding(data)):
        raise UserError(f"{path}: {other}")
    if (nul := data.find(b"\0")) >= 0:
        raise UserError(f"{path}: a NUL byte at byte {offset + nul}: not UTF-8 text (UTF-16? convert it with iconv)")
    try:
        return (data.removeprefix(BOM) if offset == 0 else data).decode("utf-8")
    except UnicodeDecodeError as error:
        offset += error.start + (len(BOM) if offset == 0 and data.startswith(BOM) else 0)
        raise UserError(
            f"{path}: invalid UTF-8 at byte {offset} (0x{error.object[error.start]:02x}, {error.reason}): "
            "convert the file from the encoding it has, for example with iconv -f windows-1252 -t utf-8 FILE > NEW"
        ) from error


def jsonl(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Yield (line number, JSON value) for each line of a .jsonl file that is not blank.

    In place of an invalid JSON value, the function yields a ValueError.
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = strict_json.loads(line, constants=False)
            except ValueError as error:
                value = error
            yield number, value


def delimited(lines: Iterable[str], **dialect: Any) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Yield (number of the row's first line, cells of the row) for each row of a CSV or TSV file that is not blank.

    `dialect` holds keyword arguments of `csv.reader`, such as `delimiter`. If a row is invalid, the function yields a
    csv.Error instead of the row's cells, and stops.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_CHARACTERS))
    rows = csv.reader(lines, **dialect)
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield number, error
            return
        if row is None:
            return
        if row:
            yield number, row


def header(row: list[str], location: str) -> list[str]:
    """Returns the column names in the header row of a file. A column without a name is called by its position, such as
    "column 2".

    Raises:
        UserError: a column name occurs twice.
    """
    columns = [name if name.strip() else f"column {i}" for i, name in enumerate(row, 1)]
    if twice := sorted(column for column, count in Counter(columns).items() if count > 1):
        raise UserError(f"{location}: column {twice[0]!r} appears twice in the header")
    return columns


def parquet(
    path: Path, location: str, columns: Callable[[Any], list[str] | None] = lambda schema: None
) -> Iterator[Any]:
    """Yield the rows of a parquet file as dicts.

    Args:
        location: name of the file in error messages.
        columns: function that takes the file's pyarrow.Schema, and returns the names of the columns to read, or None to
            read all columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024, columns=columns(file.schema_arrow)):
                yield from batch.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{location}: not a readable parquet file: {first_line(error)}") from error


def hub_name(name: str) -> tuple[str, str, str]:
    """Parse a dataset name hf:org/name[:config][@split], and return (org/name, config, split). If config or split is
    not given, "" is returned in its place.

    Raises:
        UserError: the name does not match this pattern, or a local file or folder is called org/name; `datasets` would
            read it instead of the dataset on the hub.
    """
    repo, _, split = name.removeprefix("hf:").partition("@")
    repo, _, config = repo.partition(":")
    slug = r"[A-Za-z0-9][\w.-]{0,95}"
    if not re.fullmatch(f"{slug}/{slug}", repo, re.ASCII) or ".." in repo:
        raise UserError(f"{name:.200}: expected hf:org/name, hf:org/name:config or hf:org/name:config@split")
    if Path(repo).exists():
        raise UserError(f"{name}: {repo} is a folder or file here: give its path without hf:, or start elsewhere")
    return repo, config, split


def hub(repo: str, config: str, split: str, **options: Any) -> Any:
    """Load a split of a Hugging Face hub dataset; if `split` is "", the split train is loaded. Errors of the library
    `datasets` are not caught."""
    import datasets

    return datasets.load_dataset(repo, config or None, split=split or "train", **options)


# --- for error messages


def names(keys: Iterable[object]) -> str:
    """Returns text for an error message: up to 20 keys or column names, separated by commas, and the number of names
    that are left out.

    A key or column name is quoted if it is empty, starts or ends with whitespace, or contains a comma or an unprintable
    character. If there is only one column name, and it contains a semicolon or a tab, the error message asks whether
    this character is the separator of the file.
    """
    keys = list(keys)
    if len(keys) == 1 and (separator := next((c for c in ";\t" if c in str(keys[0])), "")):
        return f"{str(keys[0])[:80]!r}, one column: is the separator {separator!r}? A .csv file needs commas"
    more = f" and {len(keys) - 20:,} more" if len(keys) > 20 else ""
    return ", ".join(map(quoted, keys[:20])) + more


def quoted(key: object) -> str:
    name = str(key)[:80]
    return name if name and name.strip() == name and name.isprintable() and "," not in name else repr(name)


def kind_of(value: object) -> str:
    names = {type(None): "null", list: "an array", dict: "an object", str: "a string", bool: "true or false"}
    return names.get(type(value), "a number")


def first_line(error: BaseException | None) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
