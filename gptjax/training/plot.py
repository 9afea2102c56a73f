"""loss.png: training and validation loss over steps; confusion.png: what a classifier takes for what; sweep.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.files import replacing
from gptjax.show import log_ticks

MOST_LABELS, LONGEST_LABEL = 12, 60  # in a legend; more would leave no room for the curves
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


def draw_confusion(table: np.ndarray, names: Sequence[str], path: Path) -> None:
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


def draw_sweep(
    rows: Sequence[dict[str, Any]],
    table: Sequence[dict[str, Any]],
    names: Sequence[str],
    curves: Mapping[tuple, Sequence[np.ndarray]],
    path: Path,
) -> None:
    """Left, validation loss: a dot a run, a line through the means with their intervals, over the first of `names` that
    has several numbers; one line for each combination of the others. Right, training loss: a curve a combination.

    Args:
        rows, table, names: of `research.sweep`. curves: values of the names -> training losses of its runs.
    """
    figure, (left, right) = _figure(12, 4.8, columns=2)
    numeric = [name for name in names if len(_values(rows, name)) > 1 and all(map(_is_number, _values(rows, name)))]
    x_name, others = (numeric or [""])[0], [name for name in names if name not in numeric[:1]]
    groups = list(dict.fromkeys(tuple(row[name] for name in others) for row in rows))
    for g, group in enumerate(groups):
        color, label = f"C{g % 10}", ", ".join(f"{n}={_short(v)}" for n, v in zip(others, group, strict=True))
        own = [line for line in table if tuple(line[name] for name in others) == group and line["val/loss"] is not None]
        dots = [row for row in rows if tuple(row[name] for name in others) == group and row["val/loss"] is not None]
        own.sort(key=lambda line: line[x_name] if x_name else 0)
        dots_at, own_at = ([row[x_name] if x_name else g for row in some] for some in (dots, own))
        left.plot(dots_at, [row["val/loss"] for row in dots], ".", color=color, alpha=0.4, markersize=4)
        halves = [(line["val/loss/high"] or line["val/loss"]) - line["val/loss"] for line in own]
        means = [line["val/loss"] for line in own]
        left.errorbar(own_at, means, halves, color=color, marker="o", capsize=3, label=label or None)
    if x_name:
        values = _values(rows, x_name)
        rate = x_name.endswith("lr") or max(values) >= 8 * min(values)
        if min(values) > 0 and rate:
            left.set_xscale("log")
            log_ticks(left.xaxis, values)
            left.tick_params(axis="x", labelrotation=30 if len(left.get_xticks()) > 6 else 0)
    else:
        left.set_xticks([])
    left.set(xlabel=x_name, ylabel="validation loss", title="mean and 95 % interval over seeds, a dot a run")
    for c, (setting, losses) in enumerate(curves.items()):
        mean = np.mean([run[: min(map(len, losses))] for run in losses], 0)
        points = _smooth([*enumerate(mean.tolist(), 1)])
        label = ", ".join(f"{n}={_short(v)}" for n, v in zip(names, setting, strict=True))
        right.plot(*zip(*points, strict=True), color=f"C{c % 10}", linewidth=1.2, label=label or None)
    right.set(xlabel="step", ylabel="training loss", title="training loss, smoothed, mean over seeds")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        labels = axes.get_legend_handles_labels()[1]
        if 1 <= len(labels) <= MOST_LABELS and max(map(len, labels)) <= LONGEST_LABEL:
            axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _values(rows: Sequence[dict[str, Any]], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png")


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
