"""loss.png: training and validation loss over steps; confusion.png: what a classifier takes for what."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MOST_NEIGHBOURS = 50  # of a point in the smoothed training loss, on each side


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the rows of metrics.jsonl into `path`, through a rename."""
    figure, axes = _figure(8, 4.8)
    train, val = _series(rows, "train/loss"), _series(rows, "val/loss")
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(*zip(*_smooth(train), strict=True), color="tab:blue", linewidth=1.8, label="train (smoothed)")
    if val:
        step, best = min(val, key=lambda point: point[1])
        label = f"validation (best {best:.3f} at step {step:,})"
        axes.plot(*zip(*val, strict=True), color="tab:orange", linewidth=1.8, marker="o", markersize=4, label=label)
        axes.axhline(best, color="tab:orange", linewidth=0.8, linestyle=":")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.25)
    axes.margins(x=0.01)
    if train or val:
        axes.legend(loc="upper right", frameon=False)
    _save(figure, path)


def draw_confusion(table: Any, names: Sequence[str], path: Path) -> None:
    """A table [C, C] of counts, rows the true classes; colours are shares of a row."""
    size = 2.5 + 0.7 * len(names)
    figure, axes = _figure(size + 0.8, size)
    shares = table / table.sum(1, keepdims=True).clip(1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), n in np.ndenumerate(table):
        dark = shares[row, column] > 0.5
        axes.text(column, row, f"{n:,}", ha="center", va="center", color="white" if dark else "black")
    axes.set(xlabel="predicted", ylabel="true", xticks=range(len(names)), yticks=range(len(names)))
    axes.set_xticklabels(names, rotation=45 if len(names) > 3 else 0)
    axes.set_yticklabels(names)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    os.replace(partial, path)


def _series(rows: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Each loss averaged with its neighbours on both sides, so that the curve does not lag."""
    width = min(MOST_NEIGHBOURS, len(points) // 20)
    losses = [loss for _, loss in points]
    out = []
    for i, (step, _) in enumerate(points):
        reach = min(width, i, len(points) - 1 - i)  # as many before as after, or the ends would be pulled
        near = losses[i - reach : i + reach + 1]
        out.append((step, sum(near) / len(near)))
    return out
