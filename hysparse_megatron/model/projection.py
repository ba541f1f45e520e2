"""The fused input projection of an attention layer, ordered by KV group.

Shapes: S sequence, B batch, HQ query heads, HKV KV groups, G = HQ / HKV, C channels, T
tensor-parallel size.

The rows of the weight, and of the bias if there is one, belong to KV group 0, then group 1, and so
on; inside a group first what each of its G query heads owns, then what the group owns.
Tensor-parallel slices hold whole groups, whatever the layer's parts are, so checkpoints reshard by
plain slicing.
With fewer groups than ranks (T > HKV) a slice is no longer a whole group: the output is gathered
and each rank keeps its own query heads and its whole group. The gather's backward sums over ranks,
which is what the shared key and value need.
"""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from hysparse_megatron.architecture.layers import Part
from hysparse_megatron.model.megatron_config import HySparseConfig


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
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        self.parts = parts
        self.num_groups = int(config.num_query_groups or config.num_attention_heads)
        self.heads_per_group = config.num_attention_heads // self.num_groups
        self.linear = linear(
            config.hidden_size,
            self.num_groups * sum(self.group_widths()),
            config=config,
            init_method=config.init_method,
            bias=config.add_qkv_bias,
            skip_bias_add=False,
            gather_output=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=pg_collection.tp,
        )

    def group_widths(self) -> list[int]:
        """Rows of each part in one KV group of the weight, in order."""
        return [part.width * (self.heads_per_group if part.per_head else 1) for part in self.parts]

    def forward(self, hidden_states: Tensor) -> dict[str, Tensor]:
        """The parts by name: [S, B, heads or groups of this rank, width]."""
        fused, _ = self.linear(hidden_states)
        ranks = self.tp_group.size()
        ranks_per_group = max(1, ranks // self.num_groups)
        if ranks_per_group > 1:
            fused = all_gather_last_dim_from_tensor_parallel_region(fused, group=self.tp_group)
            group, member = divmod(self.tp_group.rank(), ranks_per_group)
            fused = fused.unflatten(-1, (self.num_groups, -1))[:, :, group : group + 1]
        else:
            member = 0
            fused = fused.unflatten(-1, (self.num_groups // ranks, -1))

        heads = self.heads_per_group // ranks_per_group
        result = {}
        for part, piece in zip(self.parts, fused.split(self.group_widths(), dim=-1), strict=True):
            if part.per_head:
                piece = piece.unflatten(-1, (self.heads_per_group, part.width))
                piece = piece[:, :, :, member * heads : (member + 1) * heads].flatten(2, 3)
            result[part.name] = piece
        return result
