"""What one rank does in the tests beside parity; runs inside a worker, like `ranks.py`.

Shapes: S sequence, B micro-batch, M micro-batches.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from hysparse_megatron.config.schema import Config
from hysparse_megatron.model import attend
from hysparse_megatron.model.layer import HySparseLayer
from hysparse_megatron.model.local_experts import LocalExperts
from hysparse_megatron.model.norm import CompiledRMSNorm, RMSNorm
from hysparse_megatron.training.state import TrainingState
from hysparse_megatron.training.step import evaluate, train_step
from tests.distributed.ranks import (
    Piece,
    Place,
    SelectionRecorder,
    pieces,
    place_of,
    prepare,
    share_of,
)

# Replicated parameters ---------------------------------------------------------------------------

FORGOTTEN = "decoder.layers.1.input_layernorm.weight"
"""The norm weight that `forget_sequence_parallel` spoils."""


def forget_sequence_parallel(state: TrainingState) -> None:
    """Make the mistake that lets tensor-parallel ranks drift apart, for one norm."""
    [chunk] = state.chunks
    del chunk.module.decoder.layers[1].input_layernorm.weight.sequence_parallel


def compile_fusions(state: TrainingState) -> None:
    """Compute as a GPU without Transformer Engine does; the compiler itself is off in tests."""
    for chunk in state.chunks:
        chunk.module.config.compiled_inputs = True
        chunk.module.config.cross_entropy_loss_fusion = True
        for module in chunk.module.modules():
            if isinstance(module, RMSNorm):
                module.__class__ = CompiledRMSNorm


# Grouped experts ---------------------------------------------------------------------------------


def group_experts(state: TrainingState) -> None:
    """Compute experts as a Hopper GPU without Transformer Engine does in bf16."""
    state.megatron.grouped_experts = True
    for chunk in state.chunks:
        for module in chunk.module.modules():
            if isinstance(module, LocalExperts):  # whose configuration is a copy
                module.config.grouped_experts = True  # type: ignore[attr-defined]


# Causality ---------------------------------------------------------------------------------------


@dataclass
class TokenLosses:
    """What a rank computes for one batch."""

    place: Place
    losses: np.ndarray | None
    """[M, B, S] on the last stage."""
    selections: dict[int, np.ndarray]
    """By oracle layer of this rank: block indices [M, B, HKV, S, K]."""


def token_losses(
    rank: int, config: Config, batches: Sequence[np.ndarray], labels: np.ndarray, leak: bool = False
) -> list[TokenLosses]:
    """Losses per token of every batch of tokens [sequences, S + 1], with the same labels for all.

    `leak` lets every query see a little of what the next one sees.
    """
    state = prepare(config)
    kept: list[np.ndarray] = []
    last = state.chunks[-1].module
    if last.post_process:
        last.register_forward_hook(lambda _module, _inputs, out: kept.append(out.numpy().copy()))
    results = []
    for batch in batches:
        recorder = SelectionRecorder()
        with recorder.watch(), _leaking() if leak else contextlib.nullcontext():
            shares = share_of(state, torch.from_numpy(batch), torch.from_numpy(labels))
            evaluate(state, [shares])
        losses = np.stack(kept) if kept else None
        kept.clear()
        results.append(TokenLosses(place_of(state), losses, recorder.take()))
    return results


@contextlib.contextmanager
def _leaking() -> Iterator[None]:
    honest = attend.block_sparse_attention

    def leaky(*arguments: Any, **options: Any) -> Tensor:
        output = honest(*arguments, **options)
        return output + 0.1 * output.roll(-1, dims=1)

    with mock.patch.object(attend, "block_sparse_attention", leaky):
        yield


# Random streams ----------------------------------------------------------------------------------


@dataclass
class DropoutRun:
    """What a rank dropped, and its residual stream, call by call, in one step."""

    place: Place
    dropped: list[np.ndarray]
    residual: list[np.ndarray]


def dropout_in_steps(
    rank: int, config: Config, tokens: np.ndarray, steps: Sequence[int]
) -> list[DropoutRun]:
    """Make the steps with the given numbers, one after another and all on one batch."""
    state = prepare(config)
    return [_dropout_in_step(state, tokens, step) for step in steps]


def _dropout_in_step(state: TrainingState, tokens: np.ndarray, step: int) -> DropoutRun:
    run = DropoutRun(place_of(state), [], [])
    dropout: Callable[..., Tensor] = torch.nn.functional.dropout

    depth = 0

    def recorded(*arguments: Any, **options: Any) -> Tensor:
        # Under a torch function mode, as on a machine without CUDA, dropout calls itself once.
        nonlocal depth
        depth += 1
        output = dropout(*arguments, **options)
        depth -= 1
        if depth == 0:
            run.dropped.append((output == 0).numpy().copy())
        return output

    def keep_residual(_module: Any, _inputs: Any, output: Any) -> None:
        run.residual.append(output[0].detach().numpy().copy())

    hooks = [
        module.register_forward_hook(keep_residual)
        for chunk in state.chunks
        for module in chunk.modules()
        if isinstance(module, HySparseLayer)
    ]
    with mock.patch.object(torch.nn.functional, "dropout", recorded):
        train_step(state, step, share_of(state, torch.from_numpy(tokens)))
    for hook in hooks:
        hook.remove()
    return run


def initial_weights(rank: int, config: Config) -> tuple[Place, dict[str, Piece]]:
    """The rank's weights before the first step."""
    state = prepare(config)
    return place_of(state), pieces(state, lambda parameter: parameter)
