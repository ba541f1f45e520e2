"""Draw a layout as an SVG: `hysparse draw-layout 'F 3*S F | 3*S F' docs/hybrid_block.svg`.

Each layer is a column; under it the key-value cache it keeps, above it what it reads from its
oracle. Dashed lines are pipeline cuts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.layout import Layout, parse_layout
from hysparse_megatron.command import command, make_parser
from hysparse_megatron.files import require_writable, writing

COLUMN, HEIGHT, TOP, LEFT = 84, 330, 92, 24
COLORS = {LayerKind.FULL: "#d9480f", LayerKind.SPARSE: "#1971c2", LayerKind.WINDOW: "#2b8a3e"}
TITLES = {
    LayerKind.FULL: "exact attention; picks blocks",
    LayerKind.SPARSE: "reads picked blocks, plus a window",
    LayerKind.WINDOW: "window only",
}


def draw(layout: Layout) -> str:
    """The SVG text of a layout."""
    width = 2 * LEFT + COLUMN * layout.num_layers
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" '
        f'font-family="sans-serif" font-size="13" text-anchor="middle">',
        f'<rect width="{width}" height="{HEIGHT}" fill="white"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#868e96"/></marker></defs>',
    ]
    parts += [_layer(layout, index) for index in range(layout.num_layers)]
    parts += [_sharing(layout, index) for index in range(layout.num_layers)]
    parts += [_cut(index) for index in layout.cuts]
    parts += [_legend(layout), "</svg>"]
    return "\n".join(part for part in parts if part) + "\n"


def _x(index: int) -> int:
    return LEFT + COLUMN * index + COLUMN // 2


def _layer(layout: Layout, index: int) -> str:
    kind = layout.layers[index].kind
    full = kind is LayerKind.FULL
    cache_height = 70 if full else 14
    cache = "K, V of all tokens" if full else "window"
    x = _x(index)
    return (
        f'<rect x="{x - 32}" y="{TOP}" width="64" height="54" rx="6" fill="{COLORS[kind]}"/>'
        f'<text x="{x}" y="{TOP + 24}" fill="white" font-weight="bold">{kind.label}</text>'
        f'<text x="{x}" y="{TOP + 42}" fill="white">{index}</text>'
        f'<rect x="{x - 32}" y="{TOP + 66}" width="64" height="{cache_height}" rx="3" '
        f'fill="{COLORS[kind]}" opacity="0.35"><title>{escape(cache)}</title></rect>'
        f'<text x="{x}" y="{TOP + 66 + cache_height + 15}" font-size="11">'
        f"{'KV cache' if full else 'own window'}</text>"
    )


def _sharing(layout: Layout, index: int) -> str:
    oracle = layout.layers[index].oracle
    if oracle is None:
        return ""
    start, end = _x(oracle), _x(index)
    lift = TOP - 14 - 12 * (index - oracle)
    return (
        f'<path d="M{start} {TOP - 2} C{start} {lift} {end} {lift} {end} {TOP - 2}" fill="none" '
        f'stroke="#868e96" stroke-width="1.6" marker-end="url(#tip)"/>'
    )


def _cut(index: int) -> str:
    x = LEFT + COLUMN * index
    return (
        f'<line x1="{x}" y1="30" x2="{x}" y2="{TOP + 165}" stroke="#343a40" '
        f'stroke-dasharray="6 5"/><text x="{x}" y="22" font-size="11">pipeline cut</text>'
    )


def _legend(layout: Layout) -> str:
    lines = []
    kinds = [kind for kind in LayerKind if kind in layout.kinds]
    for row, kind in enumerate(kinds):
        y = TOP + 186 + 20 * row
        lines.append(
            f'<rect x="{LEFT + 10}" y="{y - 11}" width="14" height="14" fill="{COLORS[kind]}"/>'
            f'<text x="{LEFT + 32}" y="{y}" text-anchor="start">'
            f"{kind.label}: {TITLES[kind]}</text>"
        )
    return "".join(lines)


@command
def main(argv: Sequence[str]) -> int:
    """Draw as `argv` says, the command line without the program's name."""
    parser = make_parser("hysparse draw-layout", __doc__)
    parser.add_argument("layout", metavar="LAYOUT")
    parser.add_argument("output", type=Path, metavar="FILE.svg")
    args = parser.parse_args(list(argv))
    layout = parse_layout(args.layout)
    require_writable(args.output, "FILE.svg")
    with writing(args.output, "FILE.svg"):
        args.output.write_text(draw(layout))
    return 0


if __name__ == "__main__":
    sys.exit(main())
