"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hysparse_megatron.data import BatchSource, EvaluationBatches
from hysparse_megatron.errors import NumericalStop, Preempted
from hysparse_megatron.training.control import StopRequest
from hysparse_megatron.training.state import TrainingState
from hysparse_megatron.training.step import StepResult, evaluate, train_step

MAX_BAD_STEPS = 5
"""Bad (non-finite) steps in a row after which a run stops: it will not recover by itself."""


@dataclass
class Hooks:
    """What the loop calls, in one visible list. Each is the same on all ranks or does nothing."""

    on_row: list[Callable[[dict[str, Any]], None]] = field(default_factory=list)
    """After every step and every evaluation, with a row for `metrics.jsonl`."""
    save: Callable[[int], None] = lambda step: None
    """Write a checkpoint after `step` steps. Collective."""
    poll: Callable[[], None] = lambda: None
    """After every step: complete a checkpoint that was being written meanwhile. Collective."""


def train(
    state: TrainingState,
    batches: BatchSource,
    evaluation: EvaluationBatches,
    first_step: int,
    stop: StopRequest,
    hooks: Hooks,
) -> None:
    """Run from `first_step` (steps already done) to the end, with evaluations and checkpoints.

    Raises Preempted after saving when a stop was asked for, NumericalStop after too many bad steps.
    """
    train_config, checkpoint = state.config.train, state.config.checkpoint
    bad_steps = 0
    saved = first_step
    if first_step == 0:
        _evaluate(state, evaluation, 0, hooks)
    for step in range(first_step, train_config.steps):
        started = time.monotonic()
        result = train_step(state, step, list(batches.microbatches(step)))
        done = step + 1
        _report(state, done, result, time.monotonic() - started, hooks)
        hooks.poll()

        bad_steps = bad_steps + 1 if result.skipped else 0
        if bad_steps >= MAX_BAD_STEPS:
            raise NumericalStop(
                f"the loss was not finite for {bad_steps} steps up to step {done}; the samples of "
                f"the last one: {batches.sample_ids(step).tolist()}. The newest checkpoint is "
                "from before; lower optim.learning_rate or look at the data"
            )
        last = done == train_config.steps
        if last or (train_config.eval_interval and done % train_config.eval_interval == 0):
            _evaluate(state, evaluation, done, hooks)
        signal = stop.agreed()
        # Never over a run of bad steps: the newest checkpoint stays one from before them.
        if last or (not bad_steps and (signal or done % checkpoint.interval == 0)):
            hooks.save(done)
            saved = done
        if signal and not last:
            raise Preempted(
                f"stopped by {signal} after step {done}; saved at step {saved}. The same command "
                "continues"
            )


def _report(
    state: TrainingState, done: int, result: StepResult, seconds: float, hooks: Hooks
) -> None:
    train_config = state.config.train
    tokens = train_config.global_batch_size * train_config.seq_length
    row = {
        "step": done,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "tokens": done * tokens,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "skipped": result.skipped,
        **result.model_metrics,
    }
    for hook in hooks.on_row:
        hook(row)


def _evaluate(state: TrainingState, evaluation: EvaluationBatches, done: int, hooks: Hooks) -> None:
    started = time.monotonic()
    batches = [list(evaluation.microbatches(index)) for index in range(evaluation.num_batches)]
    loss = evaluate(state, batches)
    row = {"step": done, "eval_loss": loss, "eval_seconds": time.monotonic() - started}
    for hook in hooks.on_row:
        hook(row)
