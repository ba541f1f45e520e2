"""Selections of a trained model's kind in a model that is not trained.

Neighbouring tokens of a model with random weights select much at random, which is the worst case of
the sparse layers: in trained models they agree more. The oracle's own selection is still made, and
timed; the sparse layers read another.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from hysparse_kernels.benchmarking.problem import Problem
from hysparse_kernels.benchmarking.selections import synthetic
from torch import Tensor

from hysparse_megatron.config.schema import Config
from hysparse_megatron.model.attend import TrainingAttend
from hysparse_megatron.model.context_parallel import Shard
from hysparse_megatron.model.sharing import SharedAttention
from hysparse_megatron.model.stack import attending_with
from hysparse_megatron.training.state import TrainingState

MODEL, CLUSTERED = "model", "clustered"
PICKS = (MODEL, CLUSTERED)


def replaced(state: TrainingState, picks: str) -> AbstractContextManager[None]:
    """Within, sparse layers read such a selection, the same in every block and step."""
    if picks == MODEL:
        return nullcontext()
    indices = clustered(state.config, state.device)
    return attending_with(state.chunks, functools.partial(_Selected, indices=indices))


@dataclass(frozen=True, kw_only=True)
class _Selected(TrainingAttend):
    """Lets oracles share `indices`, int32 [B, HKV, S, K], in place of what they selected."""

    indices: Tensor

    def full(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, SharedAttention | None]:
        output, shared = super().full(layer, query, key, value)
        if shared is None or shared.block_indices is None:
            return output, shared
        indices = Shard.of(self.groups.cp, self.indices.shape[2]).take(self.indices, 2)
        assert shared.block_indices.shape == indices.shape
        return output, shared._replace(block_indices=indices)


def clustered(config: Config, device: torch.device) -> Tensor:
    """int32 [B, HKV, S, K], drawn as the kernels' benchmark draws them."""
    model, train = config.model, config.train
    problem = Problem(
        train.seq_length,
        model.num_attention_heads,
        model.num_query_groups,
        model.head_dim,
        model.value_dim,
        batch=train.micro_batch_size,
        block_size=model.block_size,
        num_selected=model.num_selected_blocks,
        window=model.window,
    )
    return synthetic(problem, device, clustered=True)
