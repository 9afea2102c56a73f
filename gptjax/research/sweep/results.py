"""A sweep as a table for people, and as files."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax import config
from gptjax.files import write_json, write_text
from gptjax.research.sweep.train import Sweep, table

WRITING = ".sweep.partial"  # while it is there, sweep.csv and sweep.png are those of a sweep that was killed


def lines(summary: Sequence[dict[str, Any]], axes: Sequence[str]) -> Iterator[str]:
    """`table` for people: mean +- half of the interval."""
    names = [key for key in axes if key != "seed"]
    measures = [key for key in summary[0] if f"{key}/low" in summary[0]]
    cells = [[*names, "n", *measures]]
    for line in summary:
        cells.append(
            [
                *(f"{line[key]:g}" if isinstance(line[key], float) else str(line[key]) for key in names),
                str(line["n"]),
                *(_with_half(line, key) for key in measures),
            ]
        )
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _with_half(line: dict[str, Any], key: str) -> str:
    mean, high = line[key], line[f"{key}/high"]
    if mean is None:
        return f"{line['stopped']} stopped" if line["stopped"] else "not finite"
    return f"{mean:.4f}" if high is None else f"{mean:.4f} +- {high - mean:.4f}"


def write(found: Sweep, folder: str | os.PathLike[str]) -> None:
    """sweep.csv (a line a run), sweep.json (rows, table, programs, config of run 0) and sweep.png, in `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WRITING).touch()
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in found.rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found.rows)
    write_text(folder / "sweep.csv", out.getvalue())
    summary = table(found.rows, found.axes)
    draw(found, folder / "sweep.png")
    whole = {
        "axes": list(found.axes), "rows": found.rows, "table": summary, "programs": found.programs,
        "config": config.to_yaml(found.configs[0]),
    }  # fmt: skip
    write_json(folder / "sweep.json", whole)  # last: with it the sweep is done
    (folder / WRITING).unlink(missing_ok=True)


def draw(found: Sweep, path: Path) -> None:
    """On the left the validation loss over the first axis with several numbers, a dot a run, mean and interval a line;
    on the right the training losses, a curve a combination, the mean over its seeds."""
    from gptjax.training.plot import draw_sweep

    names = [key for key in found.axes if key != "seed"]
    curves: dict[tuple, list[np.ndarray]] = {}
    for row, losses in zip(found.rows, found.losses, strict=True):
        curves.setdefault(tuple(row[key] for key in names), []).append(losses)
    draw_sweep(found.rows, table(found.rows, found.axes), names, curves, path)
