"""One optimizer step, and one forward pass over held-out batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from hysparse_megatron.runtime.random import seed_step
from hysparse_megatron.training.optimizer import set_step
from hysparse_megatron.training.state import TrainingState

Batch = dict[str, Tensor]
"""`tokens`, `labels`, `position_ids` int64 and `loss_mask` fp32: [micro batch, S], on the CPU; with
document masks `cu_seqlens` int32 [documents + 1]."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; equal on all ranks."""

    loss: float
    """Mean cross-entropy per token over the global batch, in nats."""
    grad_norm: float
    """Global gradient norm before clipping."""
    learning_rate: float
    skipped: bool
    """Whether the update was left out because the loss was not finite."""
    model_metrics: dict[str, float] = field(default_factory=dict)
    """What the model reports about itself, such as the load of its experts."""


def train_step(state: TrainingState, step: int, microbatches: Sequence[Batch]) -> StepResult:
    """Forward, backward and update for step number `step` (from 0)."""
    seed_step(state.config.train.seed, step, state.groups)
    set_step(state.schedule, step)
    for chunk in state.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    loss = _run_schedule(state, microbatches, forward_only=False)
    updated, grad_norm = False, float("nan")
    if math.isfinite(loss):  # the same on all ranks, so all update or none does
        state.optimizer.prepare_grads()
        grad_norm = float(state.optimizer.get_grad_norm())
        if math.isfinite(grad_norm):
            updated, _, _ = state.optimizer.step()
    return StepResult(
        loss=loss,
        grad_norm=float(grad_norm),
        learning_rate=state.optimizer.param_groups[0]["lr"],
        skipped=not updated,
        model_metrics=state.loads.take(len(microbatches)) if state.loads else {},
    )


def evaluate(state: TrainingState, batches: Sequence[Sequence[Batch]]) -> float:
    """Mean cross-entropy per token over `batches` (global batches of micro-batches), in nats."""
    for chunk in state.chunks:
        chunk.eval()
    with torch.no_grad():
        losses = [_run_schedule(state, microbatches, forward_only=True) for microbatches in batches]
    return sum(losses) / len(losses)


def _run_schedule(state: TrainingState, microbatches: Sequence[Batch], forward_only: bool) -> float:
    """Run megatron-core's schedule and return the mean loss per token over the global batch."""
    train = state.config.train
    schedule = get_forward_backward_func(state.groups.pp.size(), state.config.parallel.vpp)
    if state.communicator is not None:
        state.communicator.begin(len(microbatches))
    iterators: list[Iterator[Batch]] = [iter(microbatches) for _ in state.chunks]
    outputs = schedule(
        forward_step_func=partial(_forward_step, state.device),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(state.chunks) if len(state.chunks) > 1 else state.chunks[0],
        num_microbatches=len(microbatches),
        seq_length=train.seq_length,
        micro_batch_size=train.micro_batch_size,
        forward_only=forward_only,
        p2p_communicator=state.communicator,
        pg_collection=state.groups,
    )
    # Sum of losses and number of tokens, in fp64 so that the order of ranks cannot show.
    total = torch.zeros(2, dtype=torch.float64, device=state.device)
    for output in outputs:
        total += output["loss_and_tokens"]
    dist.all_reduce(total, group=state.groups.dp)
    dist.broadcast(total, src=_last_rank(state.groups.pp), group=state.groups.pp)
    return float(total[0] / total[1].clamp(min=1))


def _last_rank(group: dist.ProcessGroup) -> int:
    return dist.get_global_rank(group, group.size() - 1)


def _forward_step(device: torch.device, data_iterator: Iterator[Batch], model: torch.nn.Module):
    batch = {
        name: tensor.to(device, non_blocking=True) for name, tensor in next(data_iterator).items()
    }
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        packed_seq_params=_documents(batch),
    )
    return output, partial(_loss, batch["loss_mask"])


def _documents(batch: Batch) -> PackedSeqParams | None:
    """Where documents start, in the form in which megatron-core hands it to our stack."""
    offsets = batch.get("cu_seqlens")
    if offsets is None:
        return None
    length = batch["tokens"].shape[1]
    # Rotation only knows distances, so that every row is rotated as a whole.
    return PackedSeqParams(
        qkv_format="sbhd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=length,
        max_seqlen_kv=length,
    )


def _loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum over tokens (megatron-core divides by the global token count) and what is reported."""
    loss = (losses.float() * loss_mask).sum()
    tokens = loss_mask.sum()
    report = torch.stack([loss.detach(), tokens]).double()
    return loss, tokens.to(torch.int), {"loss_and_tokens": report}
