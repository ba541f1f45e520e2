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

_INK, _GRID, _SEEN, _READ = "#1a1a1b", "#dddddd", "#ececec", "#3b528b"
"""Of text and axes, of the grid, and of what a query may see and what it reads."""

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
"""Okabe and Ito's, told apart by most colour-blind people; without those that vanish on a page."""

_IN_THE_DARK = {
    _INK: "#e4e4e4",
    _GRID: "#3a3d42",
    _SEEN: "#34373c",
    _READ: "#8ea6e0",
    "#0072b2": "#4aa8e0",
}

_FAINT = 0.35

_STYLE: dict[str, Any] = {
    "font.size": 9.0,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
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
    faint: bool = False
    """Stand behind the others."""


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
        # Without its ends, which are hard to see on a dark and on a white page.
        colours = ListedColormap(colormaps["viridis"](np.linspace(0.35, 0.85, 256)))
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
            line.steps,
            line.values,
            label=line.label,
            color=colour,
            marker=marker,
            markersize=3,
            alpha=_FAINT if line.faint else 1.0,
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
    means, alpha = [part.mean() for part in values], _FAINT if line.faint else 1.0
    (mean,) = axes.plot(middles, means, label=line.label, color=colour, alpha=alpha)
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
            axes.broken_barh([(start, position + 1 - start)], (row - 0.4, 0.8), color=_SEEN)
            bars = []
            for block in selection.blocks[row]:
                first = start + block * selection.block_size
                # The block of the query itself is read up to the query.
                bars.append((first, min(selection.block_size, position + 1 - first)))
            axes.broken_barh(bars, (row - 0.4, 0.8), color=_READ)
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
        from cycler import cycler
    except ImportError as error:
        raise ConfigError(
            "drawing needs matplotlib: pip install matplotlib (the extra `report`)"
        ) from error
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE | {"axes.prop_cycle": cycler(color=_COLOURS)}):
        yield Figure(figsize=(WIDTH, height), layout="constrained")


def _image(figure: Figure, title: str) -> str:
    buffer = io.BytesIO()
    # A tight box, because the legend stands outside of the axes.
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(_with_dark_colours(buffer.getvalue())).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{data}">'


def _with_dark_colours(svg: bytes) -> bytes:
    """The picture with a second set of colours, for readers whose browser is dark."""
    rules = "".join(
        f'[style*="{name}: {light}"]{{{name}:{dark}!important}}'
        for light, dark in _IN_THE_DARK.items()
        for name in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme:dark){{{rules}}}</style>"
    return svg.replace(b" <defs>", f" {style}\n <defs>".encode(), 1)
