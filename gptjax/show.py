"""Draws plots in notebooks: coloured tokens, heatmaps and line plots.

The functions `tokens`, `maps` and `curves` return an object that a notebook displays if the last line of a cell is a
call of the function:

    show.tokens(tokenizer, ids)                                  tokens in different colours, with their ids as tooltips
    show.tokens(tokenizer, ids, values=losses)                   tokens coloured by a value per token
    show.maps({"head 0": w[0], "head 1": w[1]}, rows=words, columns=words)      heatmaps
    show.curves({"train": (steps, losses)}, x="step", y="loss")                 line plot
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gptjax.errors import UserError
from gptjax.tokenizers import Tokenizer

_PASTELS = ("#c6dbef", "#fdd0a2", "#c7e9c0", "#dadaeb", "#fcbba1", "#e7e1a0")
_MOST_ANNOTATED = 144  # Maximum number of cells of heatmaps that show the value of each cell.
_MOST_TICKS = 12  # Maximum number of given tick positions that are labelled on a logarithmic axis.
_LEAST_GAP = 0.07  # Minimum distance between two labelled ticks, as a fraction of the axis length.


class Html:
    """HTML that a notebook displays."""

    def __init__(self, text: str) -> None:
        self.text = text

    def _repr_html_(self) -> str:
        return self.text


class Picture:
    """A matplotlib figure that a notebook displays, with any matplotlib backend; the method `save` writes the figure to
    a file."""

    def __init__(self, figure: Any) -> None:
        self.figure = figure

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png")
        return buffer.getvalue()

    def save(self, path: str | Path) -> None:
        """Write the figure to a file; the suffix of `path` determines the file format."""
        self.figure.savefig(path)


def tokens(tokenizer: Tokenizer, ids: Iterable[int], values: Iterable[float] | None = None) -> Html:
    """Show the tokens of a text, each with a background colour and with its id as a tooltip.

    Args:
        tokenizer: any object with a method `decode(ids)` that returns a string.
        values: a finite number per token, shown by colours from white (lowest) to red (highest). None: the tokens take
            six colours in turn.

    Raises:
        UserError: the number of values differs from the number of ids.
    """
    ids = [int(i) for i in ids]
    scores = None if values is None else np.asarray(list(values), np.float64)
    if scores is not None and scores.shape != (len(ids),):
        raise UserError(f"values: expected {len(ids)} numbers, one for each token, got shape {scores.shape}")
    low, high = (0, 0) if scores is None or not ids else (np.min(scores), np.max(scores))
    spans = []
    for n, i in enumerate(ids):
        colour, note = _PASTELS[n % len(_PASTELS)], str(i)
        if scores is not None:
            # The token with the lowest value is shown in white, and the token with the highest value in red.
            level = round(255 - 155 * (scores[n] - low) / (high - low)) if high > low else 255
            colour, note = f"#ff{level:02x}{level:02x}", f"{i}: {scores[n]:.4g}"
        text = html.escape(tokenizer.decode([i])).replace(" ", "&nbsp;").replace("\n", "&crarr;<br>")
        style = f"background:{colour};color:#000;padding:2px 0;border-radius:3px"
        spans.append(f'<span title="{note}" style="{style}">{text}</span><wbr>')
    return Html(f'<div style="font-family:monospace;line-height:1.9">{"".join(spans)}</div>')


def maps(
    images: Mapping[str, ArrayLike],
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    x: str = "",
    y: str = "",
    colours: str = "Blues",
    centred: bool = False,
    per_row: int = 4,
    size: float = 3.2,
) -> Picture:
    """Draw heatmaps of matrices side by side, with a common colour scale. Small heatmaps also show the value of each
    cell.

    Args:
        images: dict from the title of each heatmap to its array [rows, columns]. Cells that are NaN stay white.
        rows, columns: tick labels of the rows and columns; if empty, their indices.
        colours: name of a matplotlib colour map.
        centred: whether to centre the colour scale at zero.
        per_row: number of heatmaps per row of the figure.
        size: width and height of each heatmap in inches.
    """
    arrays = {title: np.asarray(image, np.float64) for title, image in images.items()}
    if not arrays or any(a.ndim != 2 or not a.size for a in arrays.values()):
        shapes = {title: a.shape for title, a in arrays.items()}
        raise UserError(f"images: expected matrices [rows, columns] by title, got {shapes}")
    high = max(np.nanmax(a) for a in arrays.values())
    low = min(np.nanmin(a) for a in arrays.values())
    if centred:
        high = max(abs(low), abs(high))
        low = -high
    from matplotlib.ticker import MaxNLocator

    wide = min(per_row, len(arrays))
    tall = -(-len(arrays) // wide)
    figure, axes = _figure(size * wide + 0.8, size * tall, tall, wide)
    for i, (axis, (title, a)) in enumerate(zip(axes, arrays.items(), strict=False)):
        image = axis.imshow(a, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        for tick_axis in (axis.xaxis, axis.yaxis):
            tick_axis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(title, fontsize=10)
        axis.set(xlabel=x, ylabel=y if i % wide == 0 else "")
        if len(columns):
            axis.set_xticks(range(len(columns)), columns, rotation=90 if max(map(len, columns)) > 2 else 0, fontsize=8)
        if len(rows):
            axis.set_yticks(range(len(rows)), rows if i % wide == 0 else [""] * len(rows), fontsize=8)
        if a.size <= _MOST_ANNOTATED and len(arrays) * a.shape[1] <= 30:
            _write_numbers(axis, image, a)
    for axis in axes[len(arrays) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=list(axes), shrink=0.8)
    return Picture(figure)


def curves(
    lines: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    x: str = "",
    y: str = "",
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    marker: str = "",
) -> Picture:
    """Draw a line plot of several series; `lines` maps the name of each series to (x values, y values)."""
    if not lines:
        raise UserError("lines: expected at least one, {name: (x values, y values)}, got none")
    from matplotlib.ticker import MaxNLocator

    figure, (axis,) = _figure(7, 4, 1, 1)
    for name, (xs, ys) in lines.items():
        axis.plot(np.asarray(xs), np.asarray(ys), label=name, marker=marker, markersize=4, linewidth=1.8)
    axis.set(xlabel=x, ylabel=y, title=title)
    if log_x:
        axis.set_xscale("log")
        log_ticks(axis.xaxis, np.concatenate([np.asarray(xs, np.float64) for xs, _ in lines.values()]))
    if log_y:
        axis.set_yscale("log")
        log_ticks(axis.yaxis)
    if not log_x and all(np.asarray(xs).dtype.kind in "iu" for xs, _ in lines.values()):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    if len(lines) > 1:
        axis.legend(frameon=False)
    return Picture(figure)


def log_ticks(axis: Any, places: ArrayLike = ()) -> None:
    """Label the ticks of a logarithmic matplotlib axis with plain decimal numbers such as 0.003.

    Args:
        places: tick positions. If 1 to 12 positions are given, ticks are placed at them, except at positions too close
            to the previous tick. If no positions or more than 12 are given, the ticks depend on the range of the axis.
            They are round values if the range is below one decade, powers of ten and their multiples by 2 and 5 if it
            is below three decades, and powers of ten otherwise.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axis.set_minor_locator(NullLocator())
    places = np.unique(np.asarray(places, np.float64))
    if 0 < len(places) <= _MOST_TICKS:
        span, kept = np.log(places[-1] / places[0]), [places[0]]
        for place in places[1:]:
            if np.log(place / kept[-1]) >= _LEAST_GAP * span:
                kept.append(place)
        axis.set_ticks(kept, [f"{place:g}" for place in kept])
        return
    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    axis.set_major_locator(MaxNLocator(6) if decades < 1 else LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _write_numbers(axis: Any, image: Any, a: np.ndarray) -> None:
    """Write the value of each cell of a heatmap into the cell, in black on light cells and in white on dark cells;
    integers are written without decimals."""
    form = ".0f" if (np.nan_to_num(a) == np.round(np.nan_to_num(a))).all() else ".2f"
    for (row, column), value in np.ndenumerate(a):
        if np.isfinite(value):
            r, g, b, _ = image.cmap(image.norm(value))
            ink = "black" if 0.3 * r + 0.59 * g + 0.11 * b > 0.5 else "white"
            axis.text(column, row, f"{value:{form}}", ha="center", va="center", color=ink, fontsize=7)


def _figure(width: float, height: float, tall: int, wide: int) -> tuple[Any, list[Any]]:
    """Creates a matplotlib figure, and returns the figure and the list of its axes, row by row. No window opens,
    because the figure is created without pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(tall, wide, squeeze=False).ravel())
