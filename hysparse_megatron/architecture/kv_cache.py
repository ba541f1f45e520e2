"""Bytes of the key-value cache by context length, and what the two baselines would need.

Only full layers cache every token; sparse and window layers cache their own window, and a sparse
layer reads its oracle's cache besides (HySparse, arXiv 2602.03560, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.model import ModelConfig

CONTEXT_LENGTHS = (8_192, 16_384, 32_768, 131_072, 1_048_576)
"""The lengths that tables show, in tokens."""


def kv_cache_bytes(
    model: ModelConfig,
    layout: Sequence[LayerKind],
    context_length: int,
    bytes_per_number: int = 2,
    window_bytes_per_number: int | None = None,
) -> int:
    """Bytes of one sequence's cache after `context_length` tokens, over all ranks together.

    Two bytes a number are bf16, one is FP8; those of windows where they differ from full layers'.
    """
    in_window = bytes_per_number if window_bytes_per_number is None else window_bytes_per_number
    return sum(
        model.attention(kind).cached_numbers(context_length)
        * (bytes_per_number if kind.caches_all else in_window)
        for kind in layout
    )


def all_full(layout: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """The full-attention baseline of a layout."""
    return tuple(LayerKind.FULL for _ in layout)


def hybrid_window(layout: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """The sliding-window baseline of a layout: windows where it is sparse."""
    return tuple(LayerKind.WINDOW if kind.reads_oracle else kind for kind in layout)
