"""What `hysparse_kernels` offers by name; the package loads this when such a name is asked for."""

# ruff: noqa: F401

from hysparse_kernels.accumulation import KeyValueGradients
from hysparse_kernels.backends import BACKENDS, BackendChoice, BackendUnavailable, resolve_backend
from hysparse_kernels.block_lists import BlockLists
from hysparse_kernels.cached_attention import (
    CachedFullOutput,
    CachedRow,
    cached_full_attention,
    cached_sparse_attention,
    cached_window_attention,
    prepare_cached_selection,
    resolve_cached_backend,
)
from hysparse_kernels.call import OracleOutput, ReduceScores
from hysparse_kernels.dispatch import (
    block_sparse_attention,
    block_topk,
    oracle_attention,
    prepare_selection,
    sliding_window_attention,
)
from hysparse_kernels.gating import gated_sum
from hysparse_kernels.key_value_cache import FP8, Chunk, TokenCache, WindowCache
from hysparse_kernels.selection import (
    has_a_choice,
    neighbour_agreement,
    selected_mass,
    selected_mass_of_sample,
    shared_blocks,
)
