"""Charts as images inside an HTML page, drawn by matplotlib (the extra `report`)."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hysparse_megatron.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 6.4
HEIGHT = 3.4
"""Inches; the page scales charts to its columns."""

MAX_LEGEND_ROWS = 14
"""With more layers than this a scale of colours replaces the legend."""

MAX_POINTS = 1000
BUCKETS = 400
"""A longer line is drawn as the mean of this many equal parts, with their range behind it."""

_STYLE: dict[str, Any] = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "hysparse",
}


@dataclass(frozen=True)
class Line:
    """One line of a chart; values that are not finite leave gaps."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    layer: int | None = None
    """Of a line about one layer, which gets its colour from it."""
    colour: int | None = None
    """Number of its colour, for lines that stand in several charts; None takes the next one."""
    markers: bool = False
    """Mark the points, where there are few."""


@dataclass(frozen=True)
class Marks:
    """Vertical lines at steps."""

    label: str
    steps: Sequence[int]
    colour: str = "#888888"


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    y_label: str,
    logarithmic: bool = False,
    marks: Sequence[Marks] = (),
) -> str:
    """A chart over steps as an `<img>`."""
    with _figure() as figure:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize
        from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

        axes = figure.add_subplot()
        layers = [line.layer for line in lines if line.layer is not None]
        # Without its end, a yellow that is hard to see on white.
        colours = ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.9, 256)))
        scale = ScalarMappable(Normalize(0, max([1, *layers])), colours)
        for line in lines:
            colour = None if line.colour is None else f"C{line.colour}"
            _draw(
                axes, line, colour if line.layer is None else scale.to_rgba(np.asarray(line.layer))
            )
        for mark in marks:
            for number, step in enumerate(mark.steps):
                label = mark.label if number == 0 else None
                axes.axvline(step, color=mark.colour, linewidth=0.8, linestyle="--", label=label)
        if logarithmic and any(value > 0 for line in lines for value in line.values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(title=title, xlabel="step", ylabel=y_label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        if len(layers) > MAX_LEGEND_ROWS:
            figure.colorbar(scale, ax=axes, label="layer")
        else:
            _legend(axes)
        return _image(figure, title)


def _draw(axes: Axes, line: Line, colour: Any) -> None:
    if len(line.steps) <= MAX_POINTS:
        marker = "o" if line.markers or len(line.steps) == 1 else None
        axes.plot(
            line.steps, line.values, label=line.label, color=colour, marker=marker, markersize=3
        )
        return
    parts = [
        (steps, values[np.isfinite(values)])
        for steps, values in zip(
            np.array_split(np.asarray(line.steps), BUCKETS),
            np.array_split(np.asarray(line.values), BUCKETS),
            strict=True,
        )
    ]
    # The step in the middle of each part, and what of its values is finite.
    middles = [steps.mean() for steps, values in parts if len(values)]
    values = [values for _, values in parts if len(values)]
    (mean,) = axes.plot(middles, [part.mean() for part in values], label=line.label, color=colour)
    lowest, highest = [part.min() for part in values], [part.max() for part in values]
    axes.fill_between(middles, lowest, highest, color=mean.get_color(), alpha=0.25, linewidth=0)


def _legend(axes: Axes) -> None:
    """Beside the chart, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        axes.legend(
            handles,
            labels,
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            borderaxespad=0.0,
            frameon=False,
            fontsize=8,
        )


@dataclass(frozen=True)
class Selection:
    """What the queries of a sample read: `blocks` [query][block] count from `document_starts`."""

    positions: Sequence[int]
    document_starts: Sequence[int]
    blocks: Sequence[Sequence[int]]
    block_size: int


def selection_chart(title: str, selection: Selection) -> str:
    """A row for each query, with a bar for each block it reads, as an `<img>`."""
    with _figure(height=WIDTH * 0.9) as figure:
        axes = figure.add_subplot()
        rows = range(len(selection.positions))
        for row in rows:
            start, position = selection.document_starts[row], selection.positions[row]
            axes.broken_barh([(start, position + 1 - start)], (row - 0.4, 0.8), color="#ececec")
            bars = []
            for block in selection.blocks[row]:
                first = start + block * selection.block_size
                # The block of the query itself is read up to the query.
                bars.append((first, min(selection.block_size, position + 1 - first)))
            axes.broken_barh(bars, (row - 0.4, 0.8), color="#3b528b")
        shown = [row for row in rows if row % max(1, len(rows) // 8) == 0]
        axes.set_yticks(shown, [f"{selection.positions[row]:,}" for row in shown])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, max(selection.positions) + 1)
        axes.grid(visible=False)
        axes.set(title=title, xlabel="token that is read", ylabel="token that reads")
        return _image(figure, title)


@contextmanager
def _figure(height: float = HEIGHT) -> Iterator[Figure]:
    """An empty figure in our style. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "drawing needs matplotlib: pip install matplotlib (the extra `report`)"
        ) from error
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(WIDTH, height), layout="constrained")


def _image(figure: Figure, title: str) -> str:
    buffer = io.BytesIO()
    # A tight box, because the legend stands outside of the axes.
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{data}">'
