"""Who gets the rows of a run: the file, the trackers, the console and the status."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hysparse_megatron.architecture.parameters import parameters_of
from hysparse_megatron.config.frozen import to_tree
from hysparse_megatron.config.schema import VALIDATION, Config
from hysparse_megatron.errors import HySparseError
from hysparse_megatron.rundir import RunDirectory
from hysparse_megatron.runtime import faults
from hysparse_megatron.tracking.metrics import Console, MetricsFile, evaluation_of
from hysparse_megatron.tracking.tensorboard import TensorBoard
from hysparse_megatron.tracking.wandb import Tracker

Row = dict[str, Any]
Log = Callable[[str], None]


@contextlib.contextmanager
def recorded(
    config: Config,
    directory: RunDirectory | None,
    first_step: int,
    described: dict[str, Any],
    log: Log,
    lost: Callable[[OSError], None],
    at_last: contextlib.ExitStack,
) -> Iterator[list[Callable[[Row], None]]]:
    """What gets the rows of `metrics.jsonl`, on rank 0 alone: the others have no `directory`.

    `described` are facts for the trackers beside configuration and run record. The file is closed
    at the end; the trackers, which may take their time, with `at_last`, and with the exit code of
    what has happened by then. `lost` is told why the run directory cannot be written, instead of an
    error that would leave the other ranks waiting.
    """
    if directory is None:
        yield []
        return
    metrics = MetricsFile(directory.metrics)
    facts = {**to_tree(config), "run": directory.facts, **described}
    tracker = Tracker(
        config.tracking, directory.facts["id"], config.name, directory.path, facts, log
    )
    trackers: list[Tracker | TensorBoard] = [tracker]
    if config.tracking.tensorboard:
        trackers.append(TensorBoard(directory.path, first_step, log))
    at_last.enter_context(_closed(trackers))
    every = config.tracking.steps_between_lines(config.train.steps)
    console = Console(config.train, every)

    def keep(write: Callable[[], None], again: Callable[[], None] | None = None) -> None:
        with contextlib.suppress(OSError):
            directory.reserve.attempt(write, again)
        if directory.reserve.failure is not None:
            lost(directory.reserve.failure)

    try:
        yield [
            lambda row: keep(functools.partial(metrics.write, row), metrics.flush),
            *(tracker.log for tracker in trackers),
            functools.partial(_print_row, console, log),
            lambda row: keep(lambda: directory.status.write("running", step=row["step"])),
        ]
    finally:
        keep(metrics.close, lambda: None)


@contextlib.contextmanager
def _closed(trackers: Sequence[Tracker | TensorBoard]) -> Iterator[None]:
    exit_code = 1
    try:
        yield
        exit_code = 0
    except HySparseError as error:
        exit_code = error.exit_code
        raise
    finally:
        faults.reach("close", 0)
        for tracker in trackers:
            tracker.close(exit_code)


def describe_run(config: Config, vocab_size: int, world_size: int) -> dict[str, Any]:
    """What the trackers show of a run beside its configuration: its ranks and its parameters.

    `vocab_size` is the data's; `config.model.vocab_size` overrides it if set.
    """
    counted = parameters_of(config.model, vocab_size)
    return {
        "world_size": world_size,
        "parameters": {"total": counted.total, "active": counted.active},
    }


def _print_row(console: Console, log: Log, row: Row) -> None:
    if "eval_loss" in row:
        name = evaluation_of(row)
        told = "evaluation" if name == VALIDATION else f"evaluation on {name}:"
        log(
            f"step {row['step']}: {told} loss {row['eval_loss']:.4f}, perplexity "
            f"{row['eval_perplexity']:,.2f} ({row['eval_tokens']:,} tokens)"
        )
        if "sample" in row:
            log(f"step {row['step']}: {row['sample_prompt']!r} goes on {row['sample']!r}")
    else:
        console.step(row)
