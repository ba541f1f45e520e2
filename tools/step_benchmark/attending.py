"""Layers that attend in other ways than in training, to be measured beside it.

Selections of a trained model's kind in a model that is not trained: neighbouring tokens of a model
with random weights select much at random, which is the worst case of the sparse layers; in trained
models they agree more. The oracle's own selection is still made, and timed; the sparse layers read
another.

Keys and values that context-parallel ranks gather in every layer that reads them, as they would
without a block that shares what was gathered once.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from hysparse_kernels.benchmarking.problem import Problem
from hysparse_kernels.benchmarking.selections import Captured, synthetic
from torch import Tensor

from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.model.attend import Branches, Projected, TrainingAttend
from hysparse_megatron.model.context_parallel import Shard
from hysparse_megatron.model.sharing import Shared, SharedAttention
from hysparse_megatron.model.stack import attending_with
from hysparse_megatron.training.state import TrainingState

MODEL, CLUSTERED = "model", "clustered"


def replaced(
    state: TrainingState, picks: str, layerwise: bool = False
) -> AbstractContextManager[None]:
    """Within, sparse layers read such selections, the same in every step.

    `picks` is `MODEL`, `CLUSTERED` or a file of `hysparse capture-selections`. With `layerwise`
    keys and values are gathered in every layer; one pipeline stage. Raises ConfigError, see
    `captured`.
    """
    if picks == MODEL:
        return attending_with(state.chunks, Layerwise) if layerwise else nullcontext()
    made = _SelectedLayerwise if layerwise else _Selected
    if picks == CLUSTERED:
        selections = [clustered(state.config, state.device)]
    else:
        selections = captured(state.config, Path(picks), state.device)
    return attending_with(state.chunks, functools.partial(made, selections=selections))


@dataclass(frozen=True, kw_only=True)
class Layerwise(TrainingAttend):
    """Shares this rank's keys and values, of which every reader gathers all for itself."""

    def full(self, layer: int, own: Projected) -> tuple[Tensor, SharedAttention | None]:
        """See `Attend`."""
        output, shared = super().full(layer, own)
        if shared is not None:
            shared = shared._replace(key=own.key, value=own.value, gradients=None)
        return output, shared

    def prepared(self, shared: Shared) -> SharedAttention:
        """See `Attend`; nothing is gathered for several layers."""
        return self.with_lists(cast(SharedAttention, shared))

    def sparse(self, layer: int, own: Projected, branches: Branches, shared: Shared) -> Tensor:
        """See `Attend`."""
        whole = self.whole(cast(SharedAttention, shared))
        return super().sparse(layer, own, branches, whole)


@dataclass(frozen=True, kw_only=True)
class _Selected(TrainingAttend):
    """Lets oracles share one of `selections`, int32 [B, HKV, S, K], in place of their own."""

    selections: list[Tensor]

    def full(self, layer: int, own: Projected) -> tuple[Tensor, SharedAttention | None]:
        output, shared = super().full(layer, own)
        if shared is None or shared.block_indices is None:
            return output, shared
        selection = self.selections[layer % len(self.selections)]
        indices = Shard.of(self.groups.cp, selection.shape[2]).take(selection, 2)
        assert shared.block_indices.shape == indices.shape
        return output, shared._replace(block_indices=indices)


@dataclass(frozen=True, kw_only=True)
class _SelectedLayerwise(_Selected, Layerwise):
    """Both."""


def problem_of(config: Config) -> Problem:
    """The attention of a run, as the kernels' benchmark describes one."""
    model, train = config.model, config.train
    return Problem(
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


def clustered(config: Config, device: torch.device) -> Tensor:
    """int32 [B, HKV, S, K], drawn as the kernels' benchmark draws them."""
    return synthetic(problem_of(config), device, clustered=True)


def captured(config: Config, path: Path, device: torch.device) -> list[Tensor]:
    """Of each oracle of a trained model, int32 [B, HKV, S, K]; groups and rows are repeated.

    Raises ConfigError if they are of another length, block size or number of blocks.
    """
    model, train = config.model, config.train
    file = Captured.load(path)
    wanted = {
        "sequence": train.seq_length,
        "block_size": model.block_size,
        "num_selected": model.num_selected_blocks,
    }
    found = {name: file.facts[name] for name in wanted}
    if found != wanted:
        raise ConfigError(f"--picks {path}: has {found}, the model needs {wanted}")
    return [
        file.for_groups(layer, model.num_query_groups, device).expand(
            train.micro_batch_size, -1, -1, -1
        )
        for layer in sorted(file.layers)
    ]
