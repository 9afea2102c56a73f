"""`gptjax classify RUN ...`: predicts the class of texts from the command line, from files or from a pipe."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.cli.options import note
from gptjax.config.leaves import from_yaml as leaves_of
from gptjax.config.leaves import read_text
from gptjax.errors import UserError, did_you_mean
from gptjax.files import new_file, refuse_existing

USAGE = 'expected: gptjax classify RUN "TEXT"|FILE|- [...] [text_field=COLUMN] [out=FILE.csv]'
SETTINGS = ("text", "text_field", "out")
LINES, TABLES = (".txt", ".md"), (".csv", ".tsv", ".jsonl", ".json", ".parquet")
OUT = (".csv", ".tsv", ".jsonl")
BATCH_SIZE = 16  # number of texts that the model classifies per call
MAX_PROBLEMS = 20


class Row(NamedTuple):
    location: str
    text: str
    columns: dict[str, Any]  # dict that maps the name of each column in the file to the row's value in this column


class Request(NamedTuple):
    """The parsed command line of `gptjax classify`. `sources` lists the inputs in the order of the command line, each
    as a pair ("text", the text itself), ("file", path) or ("pipe", "-")."""

    run: str
    sources: list[tuple[str, str]]
    text_field: str | None
    out: Path | None


def run(args: list[str]) -> int:
    request = parse(args)
    from gptjax.tasks.classify import load_classifier, read_labels, refuse_reward_model
    from gptjax.training.process import use_compile_cache

    folder = Path(request.run)
    refuse_reward_model(read_labels(folder), folder)  # `read_labels` raises UserError if the model is not a classifier
    files = [file for file in (folder / "config.yaml", folder.parent / "config.yaml") if file.is_file()][:1]
    leaves = [leaf for file in files for leaf in leaves_of(read_text(file, "config"), str(file))]
    trained = {leaf.key: leaf.value for leaf in leaves}  # the settings in the config.yaml of the training run
    fields = (request.text_field, trained.get("classify.text_field"))
    if request.out:
        refuse_existing(request.out)
    columns = _check(request.sources, fields)
    if request.out:
        new_file(request.out)
    use_compile_cache()
    classify = load_classifier(request.run)
    write = _writer(request.out, columns) if request.out else show
    count = 0
    rows = itertools.chain.from_iterable(read(kind, name, fields) for kind, name in request.sources)
    for batch in chunks(rows, BATCH_SIZE):
        write(batch, classify([row.text for row in batch]))
        count += len(batch)
    if request.out:
        print(f"{count:,} texts in {request.out}")
    return 0


def parse(args: Sequence[str]) -> Request:
    """Parses the command line.

    Raises:
        UserError: no run or no text is given, a setting is unknown, or a file is missing.
    """
    folder, *rest = args or [""]
    given: dict[str, str] = {}
    sources: list[tuple[str, str]] = []
    for arg in rest:
        name, is_set, value = arg.removeprefix("--").partition("=")
        if is_set and name == "text":
            sources.append(("text", value))
        elif is_set and name in SETTINGS:
            given[name] = value
        elif is_set and name.isidentifier() and (hint := did_you_mean(name, SETTINGS)):
            raise UserError(f"unknown setting {name}{hint} To classify this as a text, use text={arg!r}")
        else:
            sources.append((_kind(arg), arg))
    if not folder or "=" in folder or not sources:
        raise UserError(USAGE)
    if sources.count(("pipe", "-")) > 1:
        raise UserError("-: standard input can be read once only; give - once")
    out = Path(given["out"]) if "out" in given else None
    if out and out.suffix.lower() not in OUT:
        raise UserError(f"out={out}: expected a {', '.join(OUT)} file")
    return Request(folder, sources, given.get("text_field"), out)


def _kind(arg: str) -> str:
    path = Path(arg).expanduser() if len(arg) < 4096 and "\0" not in arg else Path()
    known, suffix = (*LINES, *TABLES), path.suffix.lower()
    if arg == "-":
        return "pipe"
    if arg.isspace() or not arg:
        raise UserError(f"{arg!r}: the text is empty")
    try:
        is_file = path.is_file()
    except OSError:  # `is_file` raises OSError if the text is too long for a file name
        return "text"
    if is_file and suffix not in known:
        raise UserError(f"{arg}: expected a {', '.join(known)} file; to classify this as a text, use text={arg}")
    if not is_file and suffix in known and not any(map(str.isspace, arg)):
        raise UserError(f"{arg}: no such file; to classify this as a text, use text={arg}")
    return "file" if is_file else "text"


def read(kind: str, name: str, fields: tuple[str | None, str | None]) -> Iterator[Row]:
    """Yields the rows of one source of texts, which is a text on the command line, a file or a pipe.

    Args:
        fields: two names of the text column, the one given on the command line and the one used in training; either may
            be None.

    Raises:
        UserError: a row is malformed or has no text; the error is raised when the first such row is reached.
    """
    for row in _rows(kind, name, fields):
        if isinstance(row, UserError):
            raise row
        yield row


def _rows(kind: str, name: str, fields: tuple[str | None, str | None]) -> Iterator[Row | UserError]:
    from gptjax.formats import tables

    if kind == "text":
        yield Row(repr(name)[:60], name, {"text": name})
    elif kind == "pipe" or Path(name).suffix.lower() in LINES:
        lines = sys.stdin if kind == "pipe" else tables.lines(Path(name).expanduser())
        for number, line in enumerate(lines, 1):
            if text := line.rstrip("\r\n").strip():
                yield Row(f"{name}:{number}", text, {"text": text})
    else:
        table = tables.tsv(name) if name.lower().endswith(".tsv") else tables.read(name)
        field = None
        for location, row in table:
            if isinstance(row, UserError):
                yield UserError(f"{location}: {row}")
                continue
            field = field or _field(row, fields, name)
            text = row.get(field)
            if not isinstance(text, str) or not text.strip():
                problem = f"no text in column {field!r}" if field in row else f"no column {field!r}"
                yield UserError(f"{location}: {problem}; there are {', '.join(map(repr, row))}")
            else:
                yield Row(location, text, row)


def _field(row: dict[str, Any], fields: tuple[str | None, str | None], name: str) -> str:
    from gptjax.formats.tables import TEXT

    requested, trained = fields
    if requested:
        # The rows of one .json or .jsonl file may have different columns, so the first row may lack the column that
        # text_field names.
        if requested not in row and not name.lower().endswith((".json", ".jsonl")):
            hint = did_you_mean(requested, map(str, row))
            raise UserError(f"{name}: no column {requested!r}; there are {', '.join(map(repr, row))}{hint}")
        return requested
    if trained is not None and trained in row:
        return trained
    candidates = [column for column in row if str(column).strip().lower() in TEXT]
    if len(candidates) != 1:
        problem = "several columns could hold" if candidates else "no column is named like"
        columns = ", ".join(map(repr, row))
        raise UserError(f"{name}: {problem} the text, of {columns}: use text_field=COLUMN")
    return candidates[0]


def _check(sources: Sequence[tuple[str, str]], fields: tuple[str | None, str | None]) -> list[str]:
    """Checks the rows of all files, and returns the names of the files' columns in the order of appearance. A pipe has
    one column, `text`; the rows of a pipe are not checked, because a pipe can be read only once.

    Raises:
        UserError: some rows are malformed or have no text; the message lists up to MAX_PROBLEMS of them.
    """
    columns: dict[str, None] = {}
    problems: list[str] = []
    for kind, name in sources:
        if kind == "pipe":
            columns["text"] = None
            continue
        for row in _rows(kind, name, fields):
            if isinstance(row, UserError):
                problems.append(str(row))
                if len(problems) >= MAX_PROBLEMS:
                    raise UserError.all([*problems, "... there may be more"])
            else:
                columns |= dict.fromkeys(row.columns)
    if problems:
        raise UserError.all(problems)
    return list(columns)


def chunks(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """Groups the rows in lists of up to `size` rows, and yields the lists. If reading a row raises UserError, the rows
    that were read before this row are yielded, and then the error is raised."""
    chunk: list[Row] = []
    try:
        for row in rows:
            chunk.append(row)
            if len(chunk) == size:
                yield chunk
                chunk = []
    except UserError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def show(rows: Sequence[Row], predictions: Sequence[dict[str, float]]) -> None:
    """Prints one line per row: the most likely class, the probabilities of all classes, and the text.

    Args:
        predictions: for each row, a dict from each class to its probability.
    """
    for (_, text, _), probabilities in zip(rows, predictions, strict=True):
        best = max(probabilities, key=probabilities.__getitem__)
        others = ", ".join(f"{name} {p:.1%}" for name, p in probabilities.items() if name != best)
        line = " ".join(text.split())
        line = line if len(line) <= 60 else line[:57] + "..."
        print(f"{best} {probabilities[best]:.1%} ({others})  {line}", flush=True)


def _writer(out: Path, columns: Sequence[str]) -> Callable[[Sequence[Row], Sequence[dict[str, float]]], None]:
    """Creates the file `out`, and returns a function write(rows, predictions) that appends rows with their predictions
    to the file. After each call of `write`, the file contains only complete rows."""
    names = ["label", "probability"]
    if set(names) & set(columns):
        names = ["predicted_label", "predicted_probability"]
        note(f"the input has a column label or probability: the predictions are written as {' and '.join(names)}")
    if taken := sorted(set(names) & set(columns)):
        raise UserError(f"the input has the columns {', '.join(taken)} already: rename them")
    table = out.suffix.lower() != ".jsonl"
    delimiter = "\t" if out.suffix.lower() == ".tsv" else ","
    dumps = functools.partial(json.dumps, ensure_ascii=False, default=str)
    with open(out, "x", encoding="utf-8", newline="") as file:
        if table:
            csv.writer(file, delimiter=delimiter).writerow([*columns, *names])

    def write(rows: Sequence[Row], predictions: Sequence[dict[str, float]]) -> None:
        with open(out, "a", encoding="utf-8", newline="") as file:
            lines = csv.writer(file, delimiter=delimiter)
            for row, probabilities in zip(rows, predictions, strict=True):
                best = max(probabilities, key=probabilities.__getitem__)
                predicted = dict(zip(names, (best, round(probabilities[best], 6)), strict=True))
                if table:
                    values = [row.columns.get(name) for name in columns]
                    cells = [dumps(value) if isinstance(value, dict | list) else value for value in values]
                    lines.writerow([*cells, *predicted.values()])
                else:
                    file.write(dumps({**row.columns, **predicted}) + "\n")

    return write
