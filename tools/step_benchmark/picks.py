"""Selections of a trained model's kind in a model that is not trained.

Neighbouring tokens of a model with random weights select much at random, which is the worst case of
the sparse layers: in trained models they agree more. The oracle's own selection is still made, and
timed; the sparse layers read another.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from hysparse_kernels import OracleOutput, oracle_attention
from hysparse_kernels.benchmarking.problem import Problem
from hysparse_kernels.benchmarking.selections import synthetic
from torch import Tensor

from hysparse_megatron.config.schema import Config
from hysparse_megatron.model import attention

MODEL, CLUSTERED = "model", "clustered"
PICKS = (MODEL, CLUSTERED)


@contextmanager
def replaced(config: Config, picks: str, device: torch.device) -> Iterator[None]:
    """Within, sparse layers read such a selection, the same in every block and step."""
    if picks == MODEL:
        yield
        return
    indices = clustered(config, device)

    def select(*arguments: Any, **options: Any) -> OracleOutput:
        found = oracle_attention(*arguments, **options)
        if found.block_indices is None:
            return found
        assert found.block_indices.shape == indices.shape
        return found._replace(block_indices=indices)

    with mock.patch.object(
        attention, "oracle_attention", functools.wraps(oracle_attention)(select)
    ):
        yield


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
