"""The key-value cache of a whole model: what each kind of layer keeps, and the bytes it takes.

| layer  | keeps                                                                  |
|--------|------------------------------------------------------------------------|
| full   | key and value of all tokens                                            |
| sparse | a ring of `window` tokens of its own; the rest it reads of its oracle  |
| window | the same ring                                                          |

All memory is taken at the start, for as many tokens as each sequence may come to, so that nothing
moves or grows later. Bytes are those of the tensors' storage, not a formula's:
`architecture.kv_cache` has the formula (HySparse, arXiv 2602.03560, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hysparse_kernels import Chunk, TokenCache, WindowCache

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.model import ModelConfig


class KvCache:
    """The caches of all layers, for sequences of different lengths: its rows.

    Attributes:
        kinds: the kind of every layer.
        layers: the cache of every layer.
        lengths: tokens in the cache, by row.
        capacities: tokens there is room for, by row.
        device: where everything lies; "meta" takes no memory and still counts bytes.
    """

    def __init__(
        self,
        model: ModelConfig,
        kinds: Sequence[LayerKind],
        capacities: Sequence[int],
        *,
        full_dtype: torch.dtype,
        window_dtype: torch.dtype,
        device: torch.device | str,
        tensor_parallel_size: int = 1,
    ) -> None:
        """`full_dtype` may be `hysparse_kernels.FP8`.

        With fewer KV groups than tensor-parallel ranks each keeps the whole group its heads read.
        """
        self.kinds = tuple(kinds)
        self.capacities = tuple(capacities)
        self.lengths = [0] * len(capacities)
        self.device = torch.device(device)
        groups = max(1, model.num_query_groups // tensor_parallel_size)
        widths = (groups, model.head_dim, model.value_dim)
        entries = min(model.window, max(capacities))
        self.layers: tuple[TokenCache | WindowCache, ...] = tuple(
            TokenCache(capacities, *widths, full_dtype, device)
            if kind.caches_all
            else WindowCache(len(capacities), entries, *widths, window_dtype, device)
            for kind in kinds
        )

    def chunk(self, rows: Sequence[int], new: Sequence[int]) -> Chunk:
        """The step that brings `new[i]` tokens, at least 1, to row `rows[i]`.

        Raises ValueError where a row has no room for them.
        """
        past = [self.lengths[row] for row in rows]
        for row, before, more in zip(rows, past, new, strict=True):
            if before + more > self.capacities[row]:
                raise ValueError(
                    f"sequence {row} has room for {self.capacities[row]} tokens: {before} are in "
                    f"the cache and {more} more were given"
                )
        return Chunk(tuple(rows), tuple(past), tuple(new), self.device)

    def advance(self, chunk: Chunk) -> None:
        """Count the tokens of a step, once all layers have stored them."""
        for row, more in zip(chunk.rows, chunk.new, strict=True):
            self.lengths[row] += more

    def bytes_by_kind(self) -> dict[LayerKind, int]:
        """Bytes of storage on this rank, by the kind of layer that holds them."""
        found = dict.fromkeys(LayerKind, 0)
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            found[kind] += sum(tensor.untyped_storage().nbytes() for tensor in layer.tensors)
        return found

    @property
    def num_bytes(self) -> int:
        """Bytes of storage on this rank."""
        return sum(self.bytes_by_kind().values())
