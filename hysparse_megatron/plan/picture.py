"""An overview as one SVG picture: layers and stages, memory of every rank, the key-value cache.

It is light or dark as its reader's browser is, like reports of runs (tools/page.py); viewers that
know no style sheets show it light.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, floor, log10
from xml.sax.saxutils import escape

from hysparse_megatron.architecture.layers import KINDS
from hysparse_megatron.plan.memory import GIB, RankMemory
from hysparse_megatron.plan.overview import CacheRow, Overview

WIDTH, HEIGHT, MARGIN = 1000, 560, 60
STRIP_TOP, PANEL_TOP, PANEL_HEIGHT = 80, 210, 270
COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, told apart by most colour-blind people."""
KIND_COLORS = dict(zip(KINDS, COLORS, strict=False))
BAR_COLORS = ("#0072b2", "#cc79a7", "#009e73", "#e69f00", "#d55e00", "#8a8a8a")
CACHES: tuple[tuple[str, str, Callable[[CacheRow], int]], ...] = (
    ("this layout", "#d55e00", lambda row: row.ours),
    ("all full", "#0072b2", lambda row: row.all_full),
    ("windows for sparse", "#009e73", lambda row: row.hybrid_window),
)

INK, PAGE, GRID, LIMIT = "#1a1a1a", "#ffffff", "#dddddd", "#c92a2a"
_IN_THE_DARK = {
    INK: "#e4e4e4",
    PAGE: "#17191c",
    GRID: "#3a3d42",
    LIMIT: "#ff8787",
    "#0072b2": "#4aa8e0",
}
"""What replaces them, and the one line colour that is hard to see there."""

_FAR_ABOVE = 6
"""With a limit so many times the largest peak the axis ends at the peak: bars would be flat."""


def draw(overview: Overview) -> str:
    """The SVG text of a plan."""
    parameters, ranks = overview.parameters, overview.groups.world_size
    title = (
        f"{overview.config.model.layout}: {_count(parameters.total)} parameters, "
        f"{_count(parameters.active)} active, {ranks} rank{'s' if ranks > 1 else ''}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12">',
        _dark_style(),
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAGE}"/>',
        _text(MARGIN, 30, title, size=16),
        *_layers(overview),
        *_memory(overview),
        *_cache(overview.cache),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _dark_style() -> str:
    rules = "".join(
        f'[{name}="{light}"]{{{name}:{dark}}}'
        for light, dark in _IN_THE_DARK.items()
        for name in ("fill", "stroke")
    )
    return f"<style>@media (prefers-color-scheme:dark){{{rules}}}</style>"


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{INK}">'
        f"{escape(text)}</text>"
    )


def _axis_name(x: float, text: str) -> str:
    """The name of an upright axis, beside its panel."""
    y = PANEL_TOP + PANEL_HEIGHT / 2
    return (
        f'<text transform="translate({x:.1f} {y:.1f}) rotate(-90)" text-anchor="middle" '
        f'fill="{INK}">{escape(text)}</text>'
    )


def _layers(overview: Overview) -> list[str]:
    """One box per layer, a gap and the cut's megabytes between stages."""
    gap = 14.0
    num_layers = overview.plan.layout.num_layers
    room = WIDTH - 2 * MARGIN - gap * (len(overview.stages) - 1)
    width = room / num_layers
    parts, x = [], float(MARGIN)
    for index, stage in enumerate(overview.stages):
        if stage.cut is not None:
            inside = "" if stage.cut.oracle is None else " (in a block)"
            label = f"{_size(stage.cut.total_bytes)}{inside}"
            parts.append(_text(x - gap / 2, STRIP_TOP + 58 + 14 * (index % 2), label, "middle"))
        parts.append(_text(x, STRIP_TOP - 8, f"stage {index}"))
        for kind in stage.kinds:
            parts.append(
                f'<rect class="layer" data-kind="{kind}" x="{x:.2f}" y="{STRIP_TOP}" '
                f'width="{max(width - 1, 1):.2f}" height="40" fill="{KIND_COLORS[kind]}"/>'
            )
            x += width
        x += gap
    kinds = "".join(stage.kinds for stage in overview.stages)
    for place, kind in enumerate(dict.fromkeys(kinds)):
        left = MARGIN + 90 * place
        parts.append(
            f'<rect x="{left}" y="{STRIP_TOP + 84}" width="12" height="12" '
            f'fill="{KIND_COLORS[kind]}"/>'
        )
        parts.append(_text(left + 18, STRIP_TOP + 94, KINDS[kind].label))
    if len(overview.stages) > 1:
        note = "at cuts: sent by each rank per micro-batch and direction"
        parts.append(_text(WIDTH - MARGIN, STRIP_TOP + 94, note, "end"))
    return parts


def _parts_of(memory: RankMemory) -> tuple[tuple[str, int], ...]:
    return (
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations", memory.activation_bytes),
        ("working set", memory.working_set),
        ("runtime", memory.runtime),
    )


def _memory(overview: Overview) -> list[str]:
    """A stacked bar per pipeline rank, and a line at the accelerator's memory."""
    limit = overview.config.cluster.memory_gib
    is_near = limit is not None and limit * GIB < _FAR_ABOVE * overview.peak_bytes
    highest = max(overview.peak_bytes, limit * GIB if limit and is_near else 0)
    scale = (PANEL_HEIGHT - 20) / highest
    bottom = PANEL_TOP + PANEL_HEIGHT
    step = 300 / len(overview.ranks)
    parts = [_text(MARGIN, PANEL_TOP - 10, "Memory at the peak", size=14)]
    parts.append(_axis_name(MARGIN - 38, "GiB"))
    parts.append(_text(MARGIN + 150, bottom + 32, "pipeline rank", "middle"))
    for mark in _round_marks(highest / GIB):
        parts += _mark(MARGIN, MARGIN + 300, bottom - mark * GIB * scale, f"{mark:g}")
    for rank, held in enumerate(overview.ranks):
        x, y = MARGIN + step * rank, float(bottom)
        for (part, size), color in zip(_parts_of(held.memory), BAR_COLORS, strict=True):
            y -= size * scale
            parts.append(
                f'<rect data-rank="{rank}" x="{x:.1f}" y="{y:.3f}" width="{step * 0.7:.1f}" '
                f'height="{size * scale:.3f}" fill="{color}"><title>{part}: '
                f"{size / GIB:.2f} GiB</title></rect>"
            )
        middle = x + step * 0.35
        parts.append(_text(middle, bottom + 16, f"pp {rank}", "middle"))
        parts.append(_text(middle, y - 4, f"{held.memory.total / GIB:.1f}", "middle"))
    if limit is None or not is_near:
        told = "not known (cluster.memory_gib)" if limit is None else f"{limit:g} GiB, far above"
        parts.append(_text(MARGIN + 315, PANEL_TOP + 12, f"limit: {told}"))
    else:
        height = limit * GIB * scale
        y = bottom - height
        parts.append(
            f'<line class="limit" data-height="{height:.3f}" x1="{MARGIN}" x2="{MARGIN + 300}" '
            f'y1="{y:.1f}" y2="{y:.1f}" stroke="{LIMIT}" stroke-dasharray="6 4"/>'
        )
        parts.append(_text(MARGIN + 306, y + 4, f"limit {limit:g} GiB"))
    for place, (part, _) in enumerate(_parts_of(overview.ranks[0].memory)):
        y = PANEL_TOP + 50 + 18 * place
        parts.append(
            f'<rect x="{MARGIN + 315}" y="{y - 10}" width="12" height="12" '
            f'fill="{BAR_COLORS[place]}"/>'
        )
        parts.append(_text(MARGIN + 333, y, part))
    return parts


def _mark(left: float, right: float, y: float, label: str) -> list[str]:
    """A line across a panel, with its value before it."""
    line = (
        f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>'
    )
    return [line, _text(left - 6, y + 4, label, "end")]


def _round_marks(highest: float) -> list[float]:
    """About four round numbers from 0 up to `highest`."""
    power = 10.0 ** floor(log10(highest / 4))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= highest / 5)
    return [step * count for count in range(int(highest / step) + 1)]


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.3g}M"


def _size(number: float) -> str:
    """Bytes in three digits: `1.36 GB`."""
    unit, name = next(
        (u, n)
        for u, n in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
        if number >= u or u == 1
    )
    return f"{number / unit:.3g} {name}"


def _length(tokens: int) -> str:
    """Tokens as models are named by: `32k`, `1M`."""
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}k"


def _cache(rows: Sequence[CacheRow]) -> list[str]:
    """Bytes by context length on logarithmic axes, beside both baselines."""
    left, right = MARGIN + 500, WIDTH - MARGIN
    bottom = PANEL_TOP + PANEL_HEIGHT
    lengths = [log10(row.context_length) for row in rows]
    sizes = [log10(read(row)) for _, _, read in CACHES for row in rows]
    wide = max(lengths) - min(lengths)
    high = max(max(sizes) - min(sizes), 1e-9)

    def point(row: CacheRow, size: int) -> tuple[float, float]:
        x = left + (log10(row.context_length) - min(lengths)) / wide * (right - left)
        y = bottom - 10 - (log10(size) - min(sizes)) / high * (PANEL_HEIGHT - 90)
        return x, y

    parts = [_text(left, PANEL_TOP - 10, "KV cache of one sequence in bf16", size=14)]
    parts.append(_axis_name(left - 64, "size"))
    for power in range(ceil(min(sizes)), floor(max(sizes)) + 1):
        parts += _mark(left, right, point(rows[0], 10**power)[1], _size(10.0**power))
    parts.append(_text((left + right) / 2, bottom + 32, "tokens of context", "middle"))
    for place, (name, color, read) in enumerate(CACHES):
        points = [point(row, read(row)) for row in rows]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        # The window baseline lies exactly under a HySparse layout: draw it dashed.
        dashes = ' stroke-dasharray="5 5"' if place == 2 else ""
        parts.append(
            f'<polyline class="cache" points="{path}" fill="none" stroke="{color}" '
            f'stroke-width="{4 - place}"{dashes}/>'
        )
        parts.append(
            f'<rect x="{left}" y="{PANEL_TOP + 10 + 18 * place}" width="12" height="12" '
            f'fill="{color}"/>'
        )
        last = f"{name}: {_size(read(rows[-1]))} at {rows[-1].context_length:,}"
        parts.append(_text(left + 18, PANEL_TOP + 20 + 18 * place, last))
    for row in rows:
        x, _ = point(row, row.ours)
        parts.append(_text(x, bottom + 16, _length(row.context_length), "middle"))
    return parts
