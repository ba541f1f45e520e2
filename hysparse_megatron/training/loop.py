"""The training loop."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from hysparse_megatron.config.schema import VALIDATION
from hysparse_megatron.data.read.ahead import ReadAhead
from hysparse_megatron.data.read.batches import BatchSource
from hysparse_megatron.data.read.held_out import EvaluationBatches
from hysparse_megatron.data.read.order import Position
from hysparse_megatron.errors import NumericalStop
from hysparse_megatron.runtime import faults
from hysparse_megatron.training.control import Watch
from hysparse_megatron.training.guard import Guard, reason
from hysparse_megatron.training.state import TrainingState
from hysparse_megatron.training.step import StepResult, evaluate, train_step


@dataclass
class Hooks:
    """What the loop calls, in one visible list. Each is the same on all ranks or does nothing."""

    on_row: list[Callable[[dict[str, Any]], None]] = field(default_factory=list)
    """After every step and every evaluation, with a row for `metrics.jsonl`."""
    on_first_step: Callable[[], None] = lambda: None
    """After the first step of this start: everything has been built and compiled."""
    around_step: Callable[[int], AbstractContextManager[None]] = lambda step: nullcontext()
    """Around the data, the passes and the update of a step, by its number from 1."""
    observe: Callable[[int], AbstractContextManager[Callable[[], dict[str, Any]]]] = lambda step: (
        nullcontext(dict)
    )
    """Around an evaluation on the run's own split after so many steps; what it gives is called
    after it, on all ranks, for more fields of its row. Collective."""
    sample: Callable[[], dict[str, Any]] = dict
    """After an evaluation on the run's own split: text of the model for its row. Collective."""
    measure: Callable[[int, int, float, float], dict[str, Any]] = lambda *measured: {}
    """After every step, with its tokens, its seconds and those for its data: more for its row.
    Collective."""
    on_good_step: Callable[[], None] = lambda: None
    """After a step that was not left out: the weights that it began with are good."""
    save: Callable[[int, dict[str, Any]], None] = lambda step, facts: None
    """Write a checkpoint after `step` steps, with facts for `Progress`. Collective."""
    poll: Callable[[], None] = lambda: None
    """After every step: complete a checkpoint that was being written meanwhile. Collective."""


@dataclass(frozen=True)
class Progress:
    """Where a run goes on: what the loop needs to know beside weights and optimizer."""

    step: int = 0
    """Steps already done."""
    position: Position = field(default_factory=Position)
    """In the order of the samples."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the loop gave to `Hooks.save`."""


def train(
    state: TrainingState,
    batches: BatchSource | ReadAhead,
    evaluations: Mapping[str, EvaluationBatches],
    progress: Progress,
    watch: Watch,
    hooks: Hooks,
) -> None:
    """Run from `progress` to the end, with evaluations on every set by its name, and checkpoints.

    Raises Preempted after saving when a stop was asked for, OutputError when rows could not be
    written, NumericalStop after too many bad steps or an evaluation that is not finite.
    """
    train_config, checkpoint = state.config.train, state.config.checkpoint
    guard = Guard(train_config.guard, progress.facts.get("guard"))
    saves, position = _Saves(checkpoint.interval, progress.step), progress.position

    def decide(finite_here: bool, loss: float, grad_norm: float) -> str | None:
        return reason(watch.poll(guard.judge(finite_here, loss, grad_norm)))

    if progress.step == 0 or progress.facts.get("evaluation_due"):
        _evaluate(state, evaluations, progress.step, hooks, watch)
        watch.stop_before_first_step()
    for done in range(progress.step + 1, train_config.steps + 1):
        with hooks.around_step(done):
            started = time.monotonic()
            microbatches = list(batches.microbatches(position))
            data_seconds = time.monotonic() - started
            result = train_step(state, done - 1, microbatches, decide)
            guard.record(result.loss, result.grad_norm, result.skipped)
            seconds = time.monotonic() - started
        watch.deadline.saw_step(seconds)
        told = result.skipped or state.config.debug.log_sample_ids
        ids = batches.sample_ids(position).tolist() if told else []
        before, position = position.samples, batches.after(position)
        passed = (before, position.samples)
        _report(state, done, passed, result, seconds, data_seconds, guard, ids, hooks)
        saves.saw_step(done, result.skipped)
        if not result.skipped:
            hooks.on_good_step()
        hooks.poll()
        if done == progress.step + 1:
            hooks.on_first_step()
        if guard.is_lost:
            raise _lost(guard, done, result, ids)
        last, evaluation_due = done == train_config.steps, False
        if last or (train_config.eval_interval and done % train_config.eval_interval == 0):
            evaluation_due = not _evaluate(state, evaluations, done, hooks, watch)
        if last or saves.is_time(watch.stopping is not None):
            started = time.monotonic()
            faults.reach("save", done)
            facts = {"guard": guard.facts(), "evaluation_due": evaluation_due}
            hooks.save(done, {**facts, "position": dataclasses.asdict(position)})
            watch.deadline.saw_save(time.monotonic() - started)
            saves.saw_save()
        if watch.stopping and (evaluation_due or not last):
            raise watch.ending(f"after step {done}; saved at step {saves.saved}")


class _Saves:
    """When a checkpoint is written: after every `interval` steps, and before a stop.

    Amid bad steps one that is due waits for a good one, as the weights may be why they are bad. A
    stop does not wait, where weights were made that are in no checkpoint.
    """

    def __init__(self, interval: int, step: int) -> None:
        self._interval = interval
        self.saved = self._done = self._newest_good = step
        self._is_due = False

    def saw_step(self, done: int, is_bad: bool) -> None:
        """`done` steps are done, the last one of which may have been left out."""
        self._done = done
        self._newest_good = self._newest_good if is_bad else done
        self._is_due = self._is_due or done % self._interval == 0

    def is_time(self, is_stopping: bool) -> bool:
        """Whether to save now."""
        is_good = self._done == self._newest_good
        return self._newest_good > self.saved and (is_stopping or (self._is_due and is_good))

    def saw_save(self) -> None:
        """All steps so far are in a checkpoint."""
        self.saved, self._is_due = self._done, False


def _lost(guard: Guard, done: int, result: StepResult, ids: list[int]) -> NumericalStop:
    return NumericalStop(
        f"{guard.in_a_row} bad steps in a row up to step {done}: {result.bad}; the samples "
        f"of the last one: {ids}. The newest checkpoint is from before; lower "
        "optim.learning_rate or look at the data"
    )


def _report(
    state: TrainingState,
    done: int,
    samples: tuple[int, int],
    result: StepResult,
    seconds: float,
    data_seconds: float,
    guard: Guard,
    sample_ids: list[int],
    hooks: Hooks,
) -> None:
    """`samples` had been trained on before the step, and after it."""
    length, size = state.config.train.seq_length, samples[1] - samples[0]
    row: dict[str, Any] = {
        "step": done,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "global_batch_size": size,
        "samples": samples[1],
        "tokens": samples[1] * length,
        "tokens_per_second": size * length / seconds,
        "step_seconds": seconds,
        "data_seconds": data_seconds,
        "skipped": result.skipped,
        **hooks.measure(done, size * length, seconds, data_seconds),
        **result.model_metrics,
    }
    if result.skipped:
        row |= {"bad": result.bad, "skipped_steps": guard.skipped}
    if sample_ids:
        row["sample_ids"] = sample_ids
    for hook in hooks.on_row:
        hook(row)


def _evaluate(
    state: TrainingState,
    evaluations: Mapping[str, EvaluationBatches],
    done: int,
    hooks: Hooks,
    watch: Watch,
) -> bool:
    """Evaluate and report; False if a stop came before its end, the last evaluation's too, which
    must not keep the last weights from being saved in time."""
    faults.reach("evaluation", done)

    def go_on() -> bool:
        watch.poll()
        return watch.stopping is None

    for name, evaluation in evaluations.items():
        started = time.monotonic()
        batches = (list(evaluation.microbatches(index)) for index in range(evaluation.num_batches))
        with hooks.observe(done) if name == VALIDATION else nullcontext(dict) as observed:
            found = evaluate(state, batches, go_on)
        if found is None:
            return False
        row: dict[str, Any] = {
            "step": done,
            "evaluation": name,
            "eval_loss": found.loss,
            "eval_tokens": found.tokens,
            "eval_perplexity": found.perplexity,
            **observed(),
            **(hooks.sample() if name == VALIDATION else {}),
        }
        row["eval_seconds"] = time.monotonic() - started
        for hook in hooks.on_row:
            hook(row)
        if not math.isfinite(found.loss):
            raise NumericalStop(
                f"the loss on {name} is {found.loss} after step {done}: nothing is saved. The "
                "newest checkpoint is from before; lower optim.learning_rate"
            )
    return True
