"""The fused input projection of an attention layer, ordered by KV group.

Shapes: S sequence, B batch, HQ query heads, HKV KV groups, C channels, T tensor-parallel size.

The rows of the weight, and of the bias if there is one, belong to KV group 0, then group 1, and so
on; inside a group first what each of its query heads owns, then what the group owns.
Tensor-parallel slices hold whole groups, whatever the layer's parts are, so checkpoints reshard by
plain slicing.
With fewer groups than ranks (T > HKV) the T / HKV ranks of a group hold an equal share of each of
its parts: their own query heads and gates, which no other rank needs, and some channels of key and
value, which are gathered among them. So every row has one owner, as everywhere else: gradients,
their norm and optimizers need to know nothing. To repeat key and value on each rank of the group
would save that gather, about 3 % of what an 80B-A3B layer at T = 8 sends; Muon, which puts matrices
together from their slices, would find them there T / HKV times. In checkpoints, and when they are
drawn, rows stand where they do without tensor parallelism.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.jit import jit_fuser
from megatron.core.tensor_parallel import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from hysparse_megatron.architecture.layers import Part
from hysparse_megatron.model.megatron_config import HySparseConfig
from hysparse_megatron.runtime.process_groups import RunGroups


def _cut(fused: Tensor, *widths: int) -> tuple[Tensor, ...]:
    """[S, B, groups, sum of widths] -> views [S, B, groups, width]."""
    return fused.split(widths, dim=-1)


class CompiledCut(torch.autograd.Function):
    """The same for GPUs, copied to storages of their own in one pass each way.

    The plain gradient is a concatenation, whose kernel is slow where pieces are as narrow as gates.
    """

    @staticmethod
    def forward(ctx: Any, fused: Tensor, *widths: int) -> tuple[Tensor, ...]:
        """[S, B, groups, sum of widths] -> [S, B, groups, width] each."""
        return _copies(fused, widths)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Of all pieces side by side."""
        return _joined(grads), *[None] * len(grads)


@jit_fuser
def _copies(fused: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    pieces = fused.split(widths, dim=-1)
    return tuple(piece.clone(memory_format=torch.contiguous_format) for piece in pieces)


@jit_fuser
def _joined(pieces: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(pieces, dim=-1)


class GroupedProjection(MegatronModule):
    """Linear layer from [S / T or S, B, C] to several per-head or per-group parts.

    With `add_qkv_bias` all parts have a bias. Those of a sparse layer are its own query, key and
    value (of the window branch) and both gates; the key and value that its sparse branch reads
    have the oracle's.
    """

    def __init__(
        self,
        config: HySparseConfig,
        linear: type,
        parts: tuple[Part, ...],
        pg_collection: RunGroups,
    ) -> None:
        """Raises ValueError if several ranks have heads of one KV group and no group of ranks."""
        super().__init__(config=config)
        self.parts = parts
        self.num_groups = int(config.num_query_groups or config.num_attention_heads)
        self.heads_per_group = config.num_attention_heads // self.num_groups
        self.ranks_per_group = max(1, pg_collection.tp.size() // self.num_groups)
        self.sharing_group = pg_collection.kv_sharing
        if self.ranks_per_group > 1 and self.sharing_group is None:
            raise ValueError(
                f"{self.ranks_per_group} tensor-parallel ranks share a KV group, but "
                "pg_collection.kv_sharing is None: take the groups of build_process_groups"
            )
        self.linear = linear(
            config.hidden_size,
            self.num_groups * self.ranks_per_group * sum(self.widths()),
            config=config,
            init_method=config.init_method,
            bias=config.add_qkv_bias,
            skip_bias_add=False,
            gather_output=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=pg_collection.tp,
        )

    def widths(self) -> list[int]:
        """Rows of each part in this rank's slice of one KV group, in order."""
        rows = (part.width * (self.heads_per_group if part.per_head else 1) for part in self.parts)
        return [count // self.ranks_per_group for count in rows]

    def _places(self, rank: int) -> list[slice]:
        """Rows of the whole weight that a rank holds of its KV group, part by part (T > HKV)."""
        group, member = divmod(rank, self.ranks_per_group)
        start = group * self.ranks_per_group * sum(self.widths())
        found = []
        for width in self.widths():
            found.append(slice(start + member * width, start + (member + 1) * width))
            start += self.ranks_per_group * width
        return found

    def forward(self, hidden_states: Tensor) -> dict[str, Tensor]:
        """The parts by name: [S, B, heads or groups of this rank, width].

        Each has a storage of its own: what layers keep for the backward pass must not keep the
        others alive.
        """
        fused, _ = self.linear(hidden_states)
        cut = CompiledCut.apply if self.config.compiled_inputs else _cut
        pieces = cut(fused.unflatten(-1, (-1, sum(self.widths()))), *self.widths())
        found = dict(zip((part.name for part in self.parts), pieces, strict=True))
        if self.ranks_per_group > 1:
            found |= self._gathered(found)
        return {
            part.name: (found[part.name].unflatten(-1, (-1, part.width)).flatten(2, 3).contiguous())
            for part in self.parts
        }

    def _gathered(self, pieces: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the group owns, [S, B, 1, width], of the shares of all its ranks.

        The backward pass sums over the ranks, each of which has the gradient of its heads.
        """
        own = {part.name: pieces[part.name] for part in self.parts if not part.per_head}
        shares = all_gather_last_dim_from_tensor_parallel_region(
            torch.cat(list(own.values()), dim=-1), group=self.sharing_group
        ).unflatten(-1, (self.ranks_per_group, -1))
        whole = shares.split([piece.shape[-1] for piece in own.values()], dim=-1)
        return {name: piece.flatten(-2) for name, piece in zip(own, whole, strict=True)}

    def sharded_state_dict(self, prefix: str = "", *rest: Any, **named: Any) -> dict:
        """Weight and bias, with their rows where they stand without tensor parallelism."""
        result = super().sharded_state_dict(prefix, *rest, **named)
        if self.ranks_per_group > 1:
            for name in (f"{prefix}linear.weight", f"{prefix}linear.bias"):
                if name in result:
                    result[name] = self._in_parts(result[name])
        return result

    def _in_parts(self, slices: ShardedTensor) -> ShardedTensorFactory:
        """This rank's slice as one piece for each part; of the optimizer's tensors likewise."""
        places = self._places(slices.global_offset[0] // slices.local_shape[0])

        def build(key: str, tensor: Tensor, replica_id: object, flattened_range: None):
            return [
                replace(
                    slices,
                    key=key,
                    data=piece,
                    dtype=piece.dtype,
                    local_shape=tuple(piece.shape),
                    global_offset=(place.start, *slices.global_offset[1:]),
                    axis_fragmentations=None,
                    replica_id=replica_id,
                )
                for piece, place in zip(tensor.split(self.widths()), places, strict=True)
            ]

        return ShardedTensorFactory(slices.key, slices.data, build, torch.cat, slices.replica_id)
