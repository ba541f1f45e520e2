"""Attention operations of HySparse (arXiv 2602.03560): torch only, no Megatron, no GPU needed.

The names are loaded at first use, so that `hysparse_kernels.limits` can be read without torch.
"""

# ruff: noqa: F403, F405

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hysparse_kernels.public import *

__version__ = "0.1.0"
"""Of this package and of hysparse_megatron, which are released together."""

__all__ = [
    "BACKENDS",
    "FP8",
    "BackendChoice",
    "BackendUnavailable",
    "BlockLists",
    "CachedFullOutput",
    "CachedRow",
    "Chunk",
    "KeyValueGradients",
    "OracleOutput",
    "ReduceScores",
    "TokenCache",
    "WindowCache",
    "block_sparse_attention",
    "block_topk",
    "cached_full_attention",
    "cached_sparse_attention",
    "cached_window_attention",
    "gated_sum",
    "has_a_choice",
    "neighbour_agreement",
    "oracle_attention",
    "prepare_cached_selection",
    "prepare_selection",
    "resolve_backend",
    "resolve_cached_backend",
    "selected_mass",
    "selected_mass_of_sample",
    "shared_blocks",
    "sliding_window_attention",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module("hysparse_kernels.public"), name)
