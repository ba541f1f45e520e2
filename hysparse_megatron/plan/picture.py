"""An overview as one SVG picture: layers and stages, memory of every rank, the key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log10
from xml.sax.saxutils import escape

from hysparse_megatron.architecture.layers import KINDS
from hysparse_megatron.plan.memory import GIB, RankMemory
from hysparse_megatron.plan.overview import CacheRow, Overview

WIDTH, HEIGHT, MARGIN = 1000, 560, 60
STRIP_TOP, PANEL_TOP, PANEL_HEIGHT = 80, 210, 270
COLORS = ("#d9480f", "#1971c2", "#2b8a3e", "#7048e8", "#f08c00", "#0b7285")
KIND_COLORS = dict(zip(KINDS, COLORS, strict=False))
BAR_COLORS = ("#364fc7", "#1098ad", "#37b24d", "#f59f00", "#e8590c", "#868e96")
CACHES: tuple[tuple[str, str, Callable[[CacheRow], int]], ...] = (
    ("this layout", "#d9480f", lambda row: row.ours),
    ("all full", "#343a40", lambda row: row.all_full),
    ("windows for sparse", "#2b8a3e", lambda row: row.hybrid_window),
)


def draw(overview: Overview) -> str:
    """The SVG text of a plan."""
    parameters = overview.parameters
    title = (
        f"{overview.config.model.layout}: {parameters.total / 1e9:.2f}B parameters, "
        f"{parameters.active / 1e9:.2f}B active, {overview.groups.world_size} ranks"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(MARGIN, 30, title, size=16),
        *_layers(overview),
        *_memory(overview),
        *_cache(overview.cache),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(text)}</text>"
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
            label = f"{stage.cut.total_bytes / 1e6:.3g} MB{inside}"
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
    highest = max(overview.peak_bytes, (limit or 0) * GIB)
    scale = (PANEL_HEIGHT - 20) / highest
    bottom = PANEL_TOP + PANEL_HEIGHT
    step = 300 / len(overview.ranks)
    parts = [_text(MARGIN, PANEL_TOP - 4, "GiB at the peak, by pipeline rank", size=14)]
    for rank, held in enumerate(overview.ranks):
        x, y = MARGIN + step * rank, float(bottom)
        for (name, size), color in zip(_parts_of(held.memory), BAR_COLORS, strict=True):
            y -= size * scale
            parts.append(
                f'<rect data-rank="{rank}" x="{x:.1f}" y="{y:.3f}" width="{step * 0.7:.1f}" '
                f'height="{size * scale:.3f}" fill="{color}"><title>{name}: '
                f"{size / GIB:.2f} GiB</title></rect>"
            )
        parts.append(_text(x, bottom + 16, f"pp {rank}"))
        parts.append(_text(x, y - 4, f"{held.memory.total / GIB:.1f}"))
    if limit is not None:
        height = limit * GIB * scale
        y = bottom - height
        parts.append(
            f'<line class="limit" data-height="{height:.3f}" x1="{MARGIN}" x2="{MARGIN + 300}" '
            f'y1="{y:.1f}" y2="{y:.1f}" stroke="#c92a2a" stroke-dasharray="6 4"/>'
        )
    for place, (name, _) in enumerate(_parts_of(overview.ranks[0].memory)):
        y = PANEL_TOP + 20 + 18 * place
        parts.append(
            f'<rect x="{MARGIN + 315}" y="{y - 10}" width="12" height="12" '
            f'fill="{BAR_COLORS[place]}"/>'
        )
        parts.append(_text(MARGIN + 333, y, name))
    return parts


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
        y = bottom - 10 - (log10(size) - min(sizes)) / high * (PANEL_HEIGHT - 50)
        return x, y

    parts = [_text(left, PANEL_TOP - 4, "KV cache of one sequence in bf16, by context", size=14)]
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
        last = f"{name}: {read(rows[-1]) / 1e9:.3g} GB at {rows[-1].context_length:,}"
        parts.append(_text(left + 18, PANEL_TOP + 20 + 18 * place, last))
    for row in rows:
        x, _ = point(row, row.ours)
        parts.append(_text(x, bottom + 16, f"{row.context_length // 1024}k", "middle"))
    return parts
