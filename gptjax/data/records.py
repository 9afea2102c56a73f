"""Records from files of many kinds: every broken one is an answer, not the end, so that all can be named at once."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from gptjax.data import sources
from gptjax.errors import UserError
from gptjax.files import user_path
from gptjax.formats import json as strict_json

KINDS = (".json", ".jsonl", ".parquet", ".csv")


def read(source: str) -> Iterator[tuple[str, dict | UserError]]:
    """(where, record or what is wrong with it) of a .json (array), .jsonl, .parquet or .csv file, or of
    hf:org/name[:config][@split].

    Raises:
        UserError: no such file, or one that cannot be read on.
    """
    if source.startswith("hf:"):
        return _hub(source)
    path = user_path(source)
    reader = {".json": _json, ".jsonl": _jsonl, ".parquet": _parquet, ".csv": _csv}.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{source}: expected a {', '.join(KINDS)} file or hf:org/name")
    if not path.is_file():
        raise UserError(f"{source}: no such file")
    return reader(path, source)


def _object(text: str) -> dict | UserError:
    found = loads(text)
    if isinstance(found, dict | UserError):
        return found
    return UserError(f"expected a JSON object, found {sources.kind_of(found)}")


def loads(text: str) -> Any:
    """A JSON value, strictly: no key twice, no NaN; or what is wrong with it."""
    try:
        return strict_json.loads(text, constants=False)
    except JSONDecodeError as error:
        return UserError(f"not whole JSON: {error}")
    except ValueError as error:
        return UserError(str(error))


def _json(path: Path, source: str) -> Iterator[tuple[str, dict | UserError]]:
    records = loads("".join(sources.lines(path)))
    if not isinstance(records, list):
        hint = " (one object a line is .jsonl)" if isinstance(records, UserError) else ""
        what = f"{records}{hint}" if hint else f"expected an array of records, found {sources.kind_of(records)}"
        raise UserError(f"{source}: {what}")
    for number, record in enumerate(records, 1):
        wrong = UserError(f"expected an object, found {sources.kind_of(record)}")
        yield f"{source}: record {number}", record if isinstance(record, dict) else wrong


def _jsonl(path: Path, source: str) -> Iterator[tuple[str, dict | UserError]]:
    for number, line in enumerate(sources.lines(path), 1):
        if line.strip():
            yield f"{source}:{number}", _object(line)


def _csv(path: Path, source: str) -> Iterator[tuple[str, dict | UserError]]:
    """Nothing is guessed: NA and null stay text."""
    csv.field_size_limit(max(csv.field_size_limit(), sources.MAX_FIELD_CHARACTERS))
    rows = csv.reader(sources.lines(path), strict=True)
    header: list[str] = []
    while True:
        where = f"{source}:{rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield where, UserError(f"{error} (a quote that is never closed?)")
            return
        if row is None:
            return
        if not row:
            continue
        if not header:
            header = [name if name.strip() else f"column {i}" for i, name in enumerate(row, 1)]  # they may be several
            if twice := sorted(column for column, count in Counter(header).items() if count > 1):
                raise UserError(f"{where}: column {twice[0]!r} appears twice in the header")
        elif len(row) != len(header):
            yield where, UserError(f"{len(row)} columns, and the header has {len(header)}")
        else:
            yield where, dict(zip(header, row, strict=True))


def _parquet(path: Path, source: str) -> Iterator[tuple[str, dict | UserError]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{source}: row {number}", record
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{source}: not a readable parquet file: {sources.first_line(error)}") from error


def _hub(source: str) -> Iterator[tuple[str, dict | UserError]]:
    repo, config, split = sources.hub_name(source)
    try:
        import datasets

        records = list(datasets.load_dataset(repo, config or None, split=split or "train"))
    except Exception as error:  # no network, no such name, no such config: all of them are the user's to mend
        raise UserError(
            f"{source}: {type(error).__name__}: {sources.first_line(error)}\n"
            "  check the name (hf:org/name[:config][@split]) and the network, or give a local file"
        ) from error
    for number, record in enumerate(records, 1):
        yield f"{source}: record {number}", record
