"""Layouts of a slice of a model: a few layers, made of the model's own hybrid block."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.layout import parse_layout

FULL, SWA, HYSPARSE, MEGATRON = "full", "swa", "hysparse", "megatron"
LAYOUTS = (FULL, SWA, HYSPARSE)
"""What is compared by default; `megatron` is the full layout in megatron-core's own layers."""

_READERS = {FULL: "F", MEGATRON: "F", SWA: "W", HYSPARSE: "S"}
"""The letter of the layers after the oracle of a hybrid block."""

LEAST_LAYERS = 12
"""Without a number of layers a slice has the fewest whole blocks that are so many."""


def block_length(model_layout: str) -> int:
    """Layers of the first hybrid block: the oracle and the layers until the next one.

    Raises ValueError for a layout that does not begin with a hybrid block.
    """
    kinds = [layer.kind for layer in parse_layout(model_layout).layers]
    readers = itertools.takewhile(lambda kind: kind is not LayerKind.FULL, kinds[1:])
    length = 1 + sum(1 for _ in readers)
    if kinds[0] is not LayerKind.FULL or length == 1:
        raise ValueError(f"{model_layout} does not begin with a hybrid block such as F 3*S")
    return length


def default_layers(model_layout: str) -> int:
    """Layers of a slice of whole blocks, at least `LEAST_LAYERS`."""
    length = block_length(model_layout)
    return -(-LEAST_LAYERS // length) * length


def slice_layout(model_layout: str, name: str, num_layers: int) -> str:
    """The first `num_layers` of endless hybrid blocks, as `name` has them; the last may be cut."""
    reader = _READERS[name]
    if reader == "F":
        return _times(num_layers, "F")
    length = block_length(model_layout)
    blocks, rest = divmod(num_layers, length)
    parts: list[str] = []
    if blocks:
        block = _block(reader, length)
        parts.append(block if blocks == 1 else f"{blocks}*({block})")
    if rest:
        parts.append(_block(reader, rest))
    return " ".join(parts)


def _block(reader: str, length: int) -> str:
    return "F" if length == 1 else f"F {_times(length - 1, reader)}"


def _times(count: int, letter: str) -> str:
    return letter if count == 1 else f"{count}*{letter}"


def is_all_full(names: Sequence[str]) -> bool:
    """Whether layouts of these names need no hybrid block."""
    return all(_READERS[name] == "F" for name in names)
