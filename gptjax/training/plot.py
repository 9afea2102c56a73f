"""Plots training and validation losses (loss.png), confusion matrices (confusion.png) and sweeps (sweep.png)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax._moved import moved_name
from gptjax.files import replacing
from gptjax.show import log_ticks

# The figure of a sweep has no legend if the legend would have more than MAX_LABELS entries or an entry with more than
# MAX_LABEL_LENGTH characters, because such a legend would hide the curves.
MAX_LABELS, MAX_LABEL_LENGTH = 12, 60
# Losses are smoothed by a centred moving average over at most 2 * MAX_NEIGHBOURS + 1 losses.
MAX_NEIGHBOURS = 50


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Plots the training and validation losses of a run, or the mean rewards in reward tuning.

    The losses are read from `rows`, the rows of metrics.jsonl. The image file `path` is replaced atomically.
    """
    figure, axes = _figure(8, 4.8)
    rewards = _series(rows, "rollout/reward")
    train, val = rewards or _series(rows, "train/loss"), _series(rows, "val/loss")
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(*zip(*_smooth(train), strict=True), color="tab:blue", linewidth=1.8, label="train (smoothed)")
    if val:
        step, best = min(val, key=lambda point: point[1])
        if rewards:  # In reward tuning, the validation loss is the negative mean reward.
            val, best = [(at, -loss) for at, loss in val], -best
        label = f"validation (best {best:.3f} at step {step:,})"
        axes.plot(*zip(*val, strict=True), color="tab:orange", linewidth=1.8, marker="o", markersize=4, label=label)
        axes.axhline(best, color="tab:orange", linewidth=0.8, linestyle=":")
    axes.set(xlabel="step", ylabel="mean reward" if rewards else "loss (nats per token)", title=title)
    axes.grid(alpha=0.25)
    axes.margins(x=0.01)
    if train or val:
        axes.legend(loc="lower right" if rewards else "upper right", frameon=False)
    _save(figure, path)


def draw_confusion(table: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Plots a confusion matrix [C, C] of counts, with one row per true class.

    The colour of a cell of the confusion matrix shows the count in the cell as a fraction of the row's total.
    """
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
    """Plots the validation losses and the training losses of a sweep in two panels.

    The left panel plots the validation loss against the first setting in `names` that has at least two different values
    and only numbers as values. Each run is a dot. For each combination of the settings that are not on the horizontal
    axis, a line connects the losses averaged over the seeds, and error bars show the 95 % confidence intervals of the
    averages. The right panel plots the training loss against the step, smoothed and averaged over the seeds, with one
    curve for each combination of all settings.

    Args:
        rows: a dict per run, with its settings and losses.
        table: a dict per combination of settings, with the mean loss over the seeds and its confidence interval.
        names: names of the settings that differ between the runs.
        curves: a dict that maps each combination of values of the settings in `names` to the training losses of its
            runs, one array per run.
        path: path of the .png file.
    """
    figure, (left, right) = _figure(12, 4.8, columns=2)
    numeric = [name for name in names if len(_values(rows, name)) > 1 and all(map(_is_number, _values(rows, name)))]
    x_name, others = (numeric or [""])[0], [name for name in names if name not in numeric[:1]]
    groups = list(dict.fromkeys(tuple(row[name] for name in others) for row in rows))
    for g, group in enumerate(groups):
        color, label = f"C{g % 10}", ", ".join(f"{n}={_short(v)}" for n, v in zip(others, group, strict=True))
        runs, means = (
            [row for row in source if tuple(row[name] for name in others) == group and row["val/loss"] is not None]
            for source in (rows, table)
        )
        means.sort(key=lambda row: row[x_name] if x_name else 0)
        runs_x, means_x = ([row[x_name] if x_name else g for row in points] for points in (runs, means))
        left.plot(runs_x, [row["val/loss"] for row in runs], ".", color=color, alpha=0.4, markersize=4)
        half_widths = [(row["val/loss/high"] or row["val/loss"]) - row["val/loss"] for row in means]
        means_y = [row["val/loss"] for row in means]
        left.errorbar(means_x, means_y, half_widths, color=color, marker="o", capsize=3, label=label or None)
    if x_name:
        values = _values(rows, x_name)
        wide = x_name.endswith("lr") or max(values) >= 8 * min(values)
        if min(values) > 0 and wide:
            left.set_xscale("log")
            log_ticks(left.xaxis, values)
            left.tick_params(axis="x", labelrotation=30 if len(left.get_xticks()) > 6 else 0)
    else:
        left.set_xticks([])
    left.set(xlabel=x_name, ylabel="validation loss", title="mean and 95 % interval over seeds; dots are runs")
    for c, (setting, losses) in enumerate(curves.items()):
        mean = np.mean([run[: min(map(len, losses))] for run in losses], 0)
        points = _smooth([*enumerate(mean.tolist(), 1)])
        label = ", ".join(f"{n}={_short(v)}" for n, v in zip(names, setting, strict=True))
        right.plot(*zip(*points, strict=True), color=f"C{c % 10}", linewidth=1.2, label=label or None)
    right.set(xlabel="step", ylabel="training loss", title="training loss, smoothed, mean over seeds")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        labels = axes.get_legend_handles_labels()[1]
        if 1 <= len(labels) <= MAX_LABELS and max(map(len, labels)) <= MAX_LABEL_LENGTH:
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
    """Smooths a curve of losses by a moving average over the neighbours of each loss on both sides.

    An average over earlier losses only would make the smoothed curve lag behind the losses.
    """
    width = min(MAX_NEIGHBOURS, len(points) // 20)
    losses = [loss for _, loss in points]
    out = []
    for i, (step, _) in enumerate(points):
        # Near the ends of the curve, the window of the moving average shrinks on both sides, because a window with
        # different numbers of losses on its two sides would bias the average.
        reach = min(width, i, len(points) - 1 - i)
        window = losses[i - reach : i + reach + 1]
        out.append((step, sum(window) / len(window)))
    return out


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
