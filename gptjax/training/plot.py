"""loss.png: training and validation loss over steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

SMOOTHING = 0.9  # weight of the past in the smoothed training loss


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the rows of metrics.jsonl into `path`, through a rename."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    train, val = _series(rows, "train/loss"), _series(rows, "val/loss")
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(*zip(*_smooth(train), strict=True), color="tab:blue", linewidth=1.8, label="train (smoothed)")
    if val:
        axes.plot(*zip(*val, strict=True), color="tab:orange", linewidth=1.8, marker="o", markersize=4, label="validation")
        step, best = min(val, key=lambda point: point[1])
        axes.axhline(best, color="tab:orange", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"best validation {best:.3f} at step {step:,}", (1, best), xycoords=("axes fraction", "data"),
            xytext=(-4, -4), textcoords="offset points", ha="right", va="top", color="tab:orange", fontsize=9,
        )  # fmt: skip
        axes.set_ylim(*_limits([loss for _, loss in train], [loss for _, loss in val]))
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.25)
    if train or val:
        axes.legend(loc="upper right", frameon=False)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    os.replace(partial, path)


def _series(rows: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential average, corrected for its start."""
    out, total, weight = [], 0.0, 0.0
    for step, loss in points:
        total, weight = SMOOTHING * total + (1 - SMOOTHING) * loss, SMOOTHING * weight + (1 - SMOOTHING)
        out.append((step, total / weight))
    return out


def _limits(train: list[float], val: list[float]) -> tuple[float, float]:
    losses = train + val
    low, high = min(losses), max(losses)
    space = 0.08 * (high - low) or 0.1
    return low - space, high + space
