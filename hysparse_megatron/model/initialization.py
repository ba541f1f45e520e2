"""Initial weights: functions of seed, name in checkpoints and position in the whole parameter.

Where a rank's share of a parameter lies in the whole is what the model says for its checkpoints.
So weights are the same on every parallel layout that checkpoints can move between, and a rank draws
its share alone, on the device that it lives on.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from hysparse_megatron.model.megatron_config import HySparseConfig
from hysparse_megatron.runtime.normal import fill_normal, stream_key

_INTO_THE_RESIDUAL_STREAM = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def draw_weights(
    model: MegatronModule, config: HySparseConfig, groups: ProcessGroupCollection
) -> None:
    """Give a model chunk of this rank its initial weights, by `config.init_seed`.

    Matrices are normal with a standard deviation of `config.init_method_std`, divided by
    sqrt(2 * layers) where they write into the residual stream; biases are zero. Norms and sinks
    stay as they are built. Weights on the meta device stay without values.
    """
    narrow = config.init_method_std / (2 * config.num_layers) ** 0.5
    for piece in _pieces(model, groups):
        share, name = piece.data, piece.key
        if share is None or share.is_meta:
            continue
        if name.endswith("bias"):
            share.zero_()
        elif share.ndim > 1:
            # Experts are one parameter with an axis more, of which a share is one expert.
            *above, first_column = piece.global_offset
            first_row = 0
            for offset, size in zip(above, piece.global_shape, strict=False):
                first_row = first_row * size + offset
            fill_normal(
                share,
                stream_key(config.init_seed, "weights", name),
                narrow if name.endswith(_INTO_THE_RESIDUAL_STREAM) else config.init_method_std,
                first_row=first_row,
                first_column=first_column,
                num_columns=piece.global_shape[-1],
            )


def _pieces(model: MegatronModule, groups: ProcessGroupCollection) -> Iterator[ShardedTensor]:
    """Views of the model's weights, with their places in the whole parameters."""
    for entry in model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp}).values():
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        yield from (part for part in parts if isinstance(part, ShardedTensor))
