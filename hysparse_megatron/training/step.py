"""One optimizer step, and one forward pass over held-out batches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.profiler import record_function

from hysparse_megatron.errors import DataError
from hysparse_megatron.evaluation.loss import HeldOutLoss
from hysparse_megatron.model.context_parallel import Shard
from hysparse_megatron.model.stack import documents_of
from hysparse_megatron.runtime import faults
from hysparse_megatron.runtime.annotations import OPTIMIZER
from hysparse_megatron.runtime.random import seed_step
from hysparse_megatron.training.optimizer import set_step, update
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
    bad: str | None
    """Why the update was left out; None if it was made."""
    model_metrics: dict[str, float] = field(default_factory=dict)
    """What the model reports about itself, such as the load of its experts."""

    @property
    def skipped(self) -> bool:
        """Whether the update was left out."""
        return self.bad is not None


Decide = Callable[[bool, float, float], str | None]
"""From whether this rank's part of the loss is finite, the loss and the gradient norm to why the
step is bad, or None. Collective: the same answer on all ranks."""


def finite_everywhere(finite_here: bool, loss: float, grad_norm: float) -> str | None:
    """The plainest decision: a step is bad if anything is not finite on any rank."""
    bad = not (finite_here and math.isfinite(loss) and math.isfinite(grad_norm))
    flag = torch.tensor([int(bad)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return "not finite" if flag.item() else None


def train_step(
    state: TrainingState,
    step: int,
    microbatches: Sequence[Batch],
    decide: Decide = finite_everywhere,
) -> StepResult:
    """Forward, backward and, unless `decide` objects, update for step number `step` (from 0)."""
    seed_step(state.config.train.seed, step, state.groups)
    set_step(state.schedule, step)
    for chunk in state.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    biases = _expert_biases(state)
    before = [bias.clone() for bias in biases]
    if state.loads is not None:
        share = _counted_share(state, microbatches)
        state.megatron.moe_grad_scale_func = lambda: share
    pending = _run_schedule(state, microbatches, step + 1, forward_only=False)
    # Before the decision, and also after a bad loss: both are collective. And before the loss is
    # looked at: they are launched while the GPU still works at the backward pass.
    with record_function(OPTIMIZER):
        state.optimizer.prepare_grads()
        grad_norm = float(state.optimizer.get_grad_norm())
    sums = pending.read()
    loss = sums.loss / max(sums.tokens, 1)
    bad = decide(sums.finite_here, loss, grad_norm)
    if bad is None:
        with record_function(OPTIMIZER):
            update(state.optimizer, grad_norm)
        faults.spoil_weight(next(state.chunks[0].parameters()), step + 1)
    else:  # the schedule has moved these already, by what a bad step made of the routing
        for bias, kept in zip(biases, before, strict=True):
            bias.copy_(kept)
    return StepResult(
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=state.optimizer.param_groups[0]["lr"],
        bad=bad,
        model_metrics=state.loads.take(len(microbatches)) if state.loads else {},
    )


def _counted_share(state: TrainingState, microbatches: Sequence[Batch]) -> Tensor:
    """Share of the global batch's labels that count: fp32 [1]. Collective.

    megatron-core multiplies the experts' own losses by all tokens of a micro-batch, and divides all
    gradients by the tokens that count; by this share their weight is the one that is set.
    """
    counted = sum(batch["loss_mask"].double().sum() for batch in microbatches)
    places = sum(batch["loss_mask"].numel() for batch in microbatches)
    found = torch.tensor([counted, places], dtype=torch.float64, device=state.device)
    dist.all_reduce(found, group=state.groups.dp)
    return (found[:1] / found[1]).float()


def _expert_biases(state: TrainingState) -> list[Tensor]:
    """What balances the experts beside the gradient: changed by megatron-core in the schedule."""
    buffers = (named for chunk in state.chunks for named in chunk.module.named_buffers())
    return [buffer for name, buffer in buffers if name.endswith("expert_bias")]


def evaluate(
    state: TrainingState,
    batches: Iterable[Sequence[Batch]],
    go_on: Callable[[], bool] = lambda: True,
) -> HeldOutLoss | None:
    """Held-out loss over `batches` (global batches of micro-batches).

    Asks `go_on`, the same on all ranks, before every batch; None if it was told not to.

    Raises:
        DataError: no token counts.
    """
    state.settle()
    for chunk in state.chunks:
        chunk.eval()
    loss, tokens = 0.0, 0
    with torch.no_grad():
        for microbatches in batches:
            if not go_on():
                return None
            found = _run_schedule(state, microbatches, None, forward_only=True).read()
            loss, tokens = loss + found.loss, tokens + found.tokens
    if not tokens:
        raise DataError("the held-out samples have no token whose loss counts")
    return HeldOutLoss(tokens, loss / tokens)


@dataclass(frozen=True)
class _Sums:
    """Of a global batch, the same on all ranks but for `finite_here`."""

    loss: float
    """Of all tokens that count, in nats."""
    tokens: int
    finite_here: bool
    """Whether this rank's part of the loss is finite."""


@dataclass(frozen=True)
class _PendingSums:
    """What the device has yet to compute of them."""

    on_device: Tensor
    """fp64 [3]: loss, tokens and whether this rank's part is finite."""

    def read(self) -> _Sums:
        """Waits for the device."""
        loss, tokens, finite_here = self.on_device.tolist()
        return _Sums(loss, int(tokens), bool(finite_here))


def _run_schedule(
    state: TrainingState, microbatches: Sequence[Batch], step: int | None, forward_only: bool
) -> _PendingSums:
    """Run megatron-core's schedule for `step` (from 1; None in an evaluation)."""
    train = state.config.train
    schedule = get_forward_backward_func(state.groups.pp.size(), state.config.parallel.vpp)
    if state.communicator is not None:
        state.communicator.begin(len(microbatches))
    iterators: list[Iterator[Batch]] = [iter(microbatches) for _ in state.chunks]
    outputs = schedule(
        forward_step_func=partial(_forward_step, state, step),
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
    finite_here = total.isfinite().all(dim=0, keepdim=True)
    dist.all_reduce(total, group=state.groups.dp_cp)
    dist.broadcast(total, src=_last_rank(state.groups.pp), group=state.groups.pp)
    return _PendingSums(torch.cat((total, finite_here.double())))


def _last_rank(group: dist.ProcessGroup) -> int:
    return dist.get_global_rank(group, group.size() - 1)


def _forward_step(
    state: TrainingState, step: int | None, data_iterator: Iterator[Batch], model: torch.nn.Module
):
    given = next(data_iterator)
    shard = Shard.of(state.groups.cp, given["tokens"].shape[1])
    # Moved whole: what is cut out of pinned memory would not be pinned.
    batch = {name: part.to(state.device, non_blocking=True) for name, part in given.items()}
    for name in batch.keys() - {"cu_seqlens"}:
        batch[name] = shard.take(batch[name], 1)
    with contextlib.nullcontext() if step is None else state.clock.running():
        output = model(
            batch["tokens"],
            batch["position_ids"],
            None,
            labels=batch["labels"],
            packed_seq_params=documents_of(batch, shard.sequence),
        )
        if step is not None:
            faults.reach("forward", step)
    return output, partial(_loss, batch["loss_mask"], step)


def _loss(
    loss_mask: Tensor, step: int | None, losses: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum over tokens (megatron-core divides by the global token count) and what is reported."""
    tokens = loss_mask.sum()
    if step is None:
        # In fp64, so that how samples are put together cannot show.
        loss = losses.double().masked_fill(loss_mask == 0, 0.0).sum()
    else:
        loss = faults.spoil((losses.float() * loss_mask).sum(), step)
    report = torch.stack([loss.detach().double(), tokens.double()])
    return loss, tokens.to(torch.int), {"loss_and_tokens": report}
