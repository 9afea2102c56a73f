"""Formats the results of a sweep as a text table, and writes the results to files."""

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

# WRITING is the name of a marker file, which `write` creates before it writes the results of a sweep, and removes at
# the end. If a marker file exists in the folder of a sweep, `write` was interrupted.
WRITING = ".sweep.partial"


def lines(summary: Sequence[dict[str, Any]], axes: Sequence[str]) -> Iterator[str]:
    """Formats the summary of a sweep, which is returned by `table`, as lines of aligned text.

    Each metric is printed as its mean over seeds, +- the half-width of the mean's 95 % confidence interval.
    """
    names = [key for key in axes if key != "seed"]
    measures = [key for key in summary[0] if f"{key}/low" in summary[0]]
    cells = [[*names, "n", *measures]]
    for line in summary:
        cells.append(
            [
                *(f"{line[key]:g}" if isinstance(line[key], float) else str(line[key]) for key in names),
                str(line["n"]),
                *(_mean_and_half_width(line, key) for key in measures),
            ]
        )
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _mean_and_half_width(line: dict[str, Any], key: str) -> str:
    mean, high = line[key], line[f"{key}/high"]
    if mean is None:
        return f"{line['stopped']} stopped" if line["stopped"] else "not finite"
    return f"{mean:.4f}" if high is None else f"{mean:.4f} +- {high - mean:.4f}"


def write(result: Sweep, folder: str | os.PathLike[str]) -> None:
    """Writes the result of a sweep to the files sweep.csv, sweep.json and sweep.png.

    The file sweep.csv has one line per run. The file sweep.json has the swept config keys (axes), the metrics of each
    run (rows), the metrics averaged over seeds (table), statistics of the compiled programs, and the config of run 0.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WRITING).touch()
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in result.rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(result.rows)
    write_text(folder / "sweep.csv", out.getvalue())
    summary = table(result.rows, result.axes)
    draw(result, folder / "sweep.png")
    contents = {
        "axes": list(result.axes), "rows": result.rows, "table": summary, "programs": result.programs,
        "config": config.to_yaml(result.configs[0]),
    }  # fmt: skip
    # The file sweep.json is written last, so that it exists only if all files of the sweep are complete.
    write_json(folder / "sweep.json", contents)
    (folder / WRITING).unlink(missing_ok=True)


def draw(result: Sweep, path: Path) -> None:
    """Plots the validation losses and the training losses of the runs of a sweep.

    The left panel plots the validation loss against the first swept hyperparameter that has at least two values and
    only numbers as values. Each run is a dot. For each combination of the swept hyperparameters that are not on the
    horizontal axis, a line connects the mean losses over seeds, and error bars show the 95 % confidence intervals of
    the means. The right panel plots one training loss curve, smoothed and averaged over seeds, per combination of all
    swept hyperparameters.
    """
    from gptjax.training.plot import draw_sweep

    names = [key for key in result.axes if key != "seed"]
    curves: dict[tuple, list[np.ndarray]] = {}
    for row, losses in zip(result.rows, result.losses, strict=True):
        curves.setdefault(tuple(row[key] for key in names), []).append(losses)
    draw_sweep(result.rows, table(result.rows, result.axes), names, curves, path)
