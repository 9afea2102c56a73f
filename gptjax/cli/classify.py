"""`gptjax classify RUN ...`: the class of texts, from the command line, files or a pipe."""

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
AT_ONCE = 16  # texts
MAX_PROBLEMS = 20


class Row(NamedTuple):
    where: str
    text: str
    columns: dict[str, Any]  # of the file, as they came


class Asked(NamedTuple):
    """The command line, taken apart. sources: ("text", the text itself), ("file", path) or ("pipe", "-"), in order."""

    run: str
    sources: list[tuple[str, str]]
    text_field: str | None
    out: Path | None


def run(args: list[str]) -> int:
    asked = parse(args)
    from gptjax.tasks.classify import load_classifier, read_labels
    from gptjax.training.process import use_compile_cache

    folder = Path(asked.run)
    read_labels(folder)  # raises UserError where the model is no classifier
    files = [file for file in (folder / "config.yaml", folder.parent / "config.yaml") if file.is_file()][:1]
    leaves = [leaf for file in files for leaf in leaves_of(read_text(file, "config"), str(file))]
    trained = {leaf.key: leaf.value for leaf in leaves}  # what the run's config.yaml says
    fields = (asked.text_field, trained.get("classify.text_field"))
    if asked.out:
        refuse_existing(asked.out)
    columns = _look(asked.sources, fields)
    if asked.out:
        new_file(asked.out)
    use_compile_cache()
    classify = load_classifier(asked.run)
    write = _writer(asked.out, columns) if asked.out else show
    count = 0
    rows = itertools.chain.from_iterable(read(kind, name, fields) for kind, name in asked.sources)
    for some in chunks(rows, AT_ONCE):
        write(some, classify([row.text for row in some]))
        count += len(some)
    if asked.out:
        print(f"{count:,} texts in {asked.out}")
    return 0


def more_help(args: list[str]) -> str:
    return f"""RUN is the run directory of gptjax finetune classify. Texts come from

  "TEXT"         the command line, as they are
  FILE           an existing {", ".join(TABLES)} file, or {" or ".join(LINES)} with a text per line
  -              standard input, a text per line

  text_field=COLUMN  the column of the texts; without it the one of the training, else the one that is called like it
  text=TEXT          a text that is also the name of a file
  out=FILE           a new {", ".join(OUT)} file: the columns of the rows, then label and probability (predicted_label,
                     predicted_probability where the rows have these); rows are written as they are done"""


def parse(args: Sequence[str]) -> Asked:
    """Raises UserError: no run, no text, an unknown setting, a file that is not there."""
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
            raise UserError(f"unknown setting {name}{hint} To classify the text itself say text={arg!r}")
        else:
            sources.append((_kind(arg), arg))
    if not folder or "=" in folder or not sources:
        raise UserError(USAGE)
    if sources.count(("pipe", "-")) > 1:
        raise UserError("-: standard input can be read once only")
    out = Path(given["out"]) if "out" in given else None
    if out and out.suffix.lower() not in OUT:
        raise UserError(f"out={out}: expected a {', '.join(OUT)} file")
    return Asked(folder, sources, given.get("text_field"), out)


def _kind(arg: str) -> str:
    path = Path(arg).expanduser() if len(arg) < 4096 and "\0" not in arg else Path()
    known, suffix = (*LINES, *TABLES), path.suffix.lower()
    if arg == "-":
        return "pipe"
    if arg.isspace() or not arg:
        raise UserError(f"{arg!r}: the text is empty")
    try:
        is_file = path.is_file()
    except OSError:  # too long for a name
        return "text"
    if is_file and suffix not in known:
        raise UserError(f"{arg}: expected a {', '.join(known)} file; to classify the text itself say text={arg}")
    if not is_file and suffix in known and not any(map(str.isspace, arg)):
        raise UserError(f"{arg}: no such file; to classify the text itself say text={arg}")
    return "file" if is_file else "text"


def read(kind: str, name: str, fields: tuple[str | None, str | None]) -> Iterator[Row]:
    """The rows of one source.

    Args:
        fields: the column that was asked for, and the one of the training.

    Raises:
        UserError: at the first row that cannot be classified.
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
        for where, row in table:
            if isinstance(row, UserError):
                yield UserError(f"{where}: {row}")
                continue
            field = field or _field(row, fields, name)
            text = row.get(field)
            if not isinstance(text, str) or not text.strip():
                there = f"no text in column {field!r}" if field in row else f"no column {field!r}"
                yield UserError(f"{where}: {there}; there are {', '.join(map(repr, row))}")
            else:
                yield Row(where, text, row)


def _field(row: dict[str, Any], fields: tuple[str | None, str | None], name: str) -> str:
    from gptjax.formats.tables import TEXT

    asked, trained = fields
    if asked:
        return asked
    if trained is not None and trained in row:
        return trained
    fits = [column for column in row if str(column).strip().lower() in TEXT]
    if len(fits) != 1:
        several = "several columns could be" if fits else "no column is called like"
        columns = ", ".join(map(repr, row))
        raise UserError(f"{name}: {several} the text, of {columns}: say text_field=COLUMN")
    return fits[0]


def _look(sources: Sequence[tuple[str, str]], fields: tuple[str | None, str | None]) -> list[str]:
    """The columns of all rows but the pipe's, in the order in which they come.

    Raises:
        UserError: what is wrong with the files, before the model is loaded.
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
    """Up to `size` rows at a time; before a row that cannot be read come those that stand before it."""
    some: list[Row] = []
    try:
        for row in rows:
            some.append(row)
            if len(some) == size:
                yield some
                some = []
    except UserError:
        if some:
            yield some
        raise
    if some:
        yield some


def show(rows: Sequence[Row], found: Sequence[dict[str, float]]) -> None:
    for (_, text, _), row in zip(rows, found, strict=True):
        best = max(row, key=row.__getitem__)
        others = ", ".join(f"{name} {p:.1%}" for name, p in row.items() if name != best)
        line = " ".join(text.split())
        print(f"{best} {row[best]:.1%} ({others})  {line if len(line) <= 60 else line[:57] + '...'}", flush=True)


def _writer(out: Path, columns: Sequence[str]) -> Callable[[Sequence[Row], Sequence[dict[str, float]]], None]:
    """(rows, found) -> None: what appends them to `out`, which is whole after every call."""
    names = ["label", "probability"]
    if set(names) & set(columns):
        names = ["predicted_label", "predicted_probability"]
        note(f"the rows have a column label or probability: what is found is called {' and '.join(names)}")
    if taken := sorted(set(names) & set(columns)):
        raise UserError(f"the rows have the columns {', '.join(taken)} already: rename them")
    table = out.suffix.lower() != ".jsonl"
    delimiter = "\t" if out.suffix.lower() == ".tsv" else ","
    dumps = functools.partial(json.dumps, ensure_ascii=False, default=str)
    with open(out, "x", encoding="utf-8", newline="") as file:
        if table:
            csv.writer(file, delimiter=delimiter).writerow([*columns, *names])

    def write(rows: Sequence[Row], found: Sequence[dict[str, float]]) -> None:
        with open(out, "a", encoding="utf-8", newline="") as file:
            lines = csv.writer(file, delimiter=delimiter)
            for row, probabilities in zip(rows, found, strict=True):
                best = max(probabilities, key=probabilities.__getitem__)
                own = dict(zip(names, (best, round(probabilities[best], 6)), strict=True))
                if table:
                    values = [row.columns.get(name) for name in columns]
                    cells = [dumps(value) if isinstance(value, dict | list) else value for value in values]
                    lines.writerow([*cells, *own.values()])
                else:
                    file.write(dumps({**row.columns, **own}) + "\n")

    return write
