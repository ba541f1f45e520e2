"""A whole run on one rank: join the group, prepare data, build, resume, train, report."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hysparse_megatron.checkpoint import store
from hysparse_megatron.checkpoint.saver import Saver
from hysparse_megatron.config.frozen import config_hash
from hysparse_megatron.config.schema import VALIDATION, Config
from hysparse_megatron.data.read.ahead import ReadAhead
from hysparse_megatron.data.sources import TrainingData
from hysparse_megatron.errors import ConfigError, NumericalStop, OutputError, Preempted, RankFailure
from hysparse_megatron.model.probe import Probe
from hysparse_megatron.rundir import RunDirectory
from hysparse_megatron.runtime import (
    determinism,
    faults,
    flight_recorder,
    last_words,
    memory_history,
    rendezvous,
    step_profile,
)
from hysparse_megatron.runtime import device as runtime_device
from hysparse_megatron.runtime.agreement import on_rank_zero, require_equal
from hysparse_megatron.runtime.launcher import Rank
from hysparse_megatron.tracking.architecture import ArchitectureWatch
from hysparse_megatron.tracking.meter import Meter
from hysparse_megatron.tracking.records import describe_run, recorded
from hysparse_megatron.training import outcome
from hysparse_megatron.training.control import STOP_FILE, Deadline, Signals, Watch
from hysparse_megatron.training.loop import Hooks, train
from hysparse_megatron.training.resume import choose_checkpoint, manifest_facts, resume
from hysparse_megatron.training.run_data import open_batches, prepare_data
from hysparse_megatron.training.sample import text_sample
from hysparse_megatron.training.startup_log import (
    attention_backend,
    describe_evaluations,
    describe_start,
)
from hysparse_megatron.training.state import TrainingState, build_state


@dataclass(frozen=True)
class Run:
    """One rank's part of a run; `directory` is rank 0's alone."""

    config: Config
    rank: Rank
    device: torch.device
    watch: Watch
    directory: RunDirectory | None
    log: Callable[[str], None]
    at_last: ExitStack
    """What may take its time: left when `status.json` says how the run has ended."""

    @property
    def checkpoints(self) -> Path:
        """Where they are written."""
        return self.config.run_path / "checkpoints"


def run(config: Config, rank: Rank, overrides: Sequence[str] = ()) -> None:
    """Train `config` to its end. Raises the errors of `hysparse_megatron.errors`.

    `overrides` made `config`; they appear in the commands that the summary suggests.
    """
    log = functools.partial(print, flush=True) if rank.rank == 0 else _log_nothing
    device = _join(config, rank, log)
    deadline = Deadline(config.train.deadline_minutes)
    watch = Watch(device, Signals(), deadline, config.run_path / STOP_FILE)
    directory: RunDirectory | None = None
    with ExitStack() as at_last:
        try:
            require_equal("the configuration", config_hash(config), ConfigError)
            attention_backend(config, device)
            step_profile.refuse_unusable(config.debug.profile, device)
            with _memory_watched(config, rank, device):
                directory = outcome.open_directory(config, _machine(device, rank), log)
                if directory is not None:
                    at_last.callback(directory.close)
                this = Run(config, rank, device, watch, directory, log, at_last)
                _from_start_to_end(this, overrides)
        except BaseException as error:
            told = last_words.explain(error)
            if directory is not None:
                outcome.write_end(directory, told, watch)
            if told is not error:
                raise told from error
            raise
    runtime_device.stop()


def _from_start_to_end(run: Run, overrides: Sequence[str]) -> None:
    config, directory, log = run.config, run.directory, run.log
    if directory is not None:
        store.remove_leftovers(run.checkpoints)
    latest = choose_checkpoint(config, run.checkpoints, log)
    if outcome.is_finished(config, directory, latest, log):
        return
    torch.autograd.set_detect_anomaly(config.debug.detect_anomaly)
    corpus, others = prepare_data(config, run.rank, run.watch, log)
    state = build_state(config, corpus.vocab_size, run.device)
    describe_start(state, corpus, log)
    progress = resume(state, latest, corpus, others, log)
    on_rank_zero(lambda: directory.keep_settings() if directory else None, ConfigError)
    batches, evaluations = open_batches(state, corpus, others, run.watch)
    describe_evaluations(evaluations, config.train.seq_length, log)

    saver = _saver(run, state, corpus, others, latest)
    described = describe_run(config, corpus.vocab_size, run.rank.world_size)
    lost = run.watch.lose_output
    start, at_last = progress.step, run.at_last
    with recorded(config, directory, start, described, log, lost, at_last) as on_row:
        hooks = Hooks(
            on_row=on_row,
            measure=_meter(run, state, corpus).measure,
            on_first_step=lambda: rendezvous.set_timeout(config.parallel.timeout_seconds),
            save=saver.save,
            on_good_step=saver.saw_good_step,
            poll=saver.poll,
        )
        if config.tracking.architecture:
            hooks.observe = _architecture_watch(run, state).observe
        if config.tracking.sample_tokens and VALIDATION in evaluations:
            hooks.sample = text_sample(state, corpus, evaluations[VALIDATION], log).fields
        try:
            steps = range(progress.step + 1, config.train.steps + 1)
            with (
                ReadAhead(batches, progress.position, steps, run.device) as ahead,
                step_profile.profiled(
                    config.debug.profile, config.run_path, run.rank.rank, progress.step, log, lost
                ) as hooks.around_step,
            ):
                train(state, ahead, evaluations, progress, run.watch, hooks)
        # Raised by all ranks together, so that they can wait for each other's files. What is being
        # deleted, which rank 0 does alone, the next start deletes as well.
        except (Preempted, OutputError):
            saver.finish_save()
            raise
        except NumericalStop:
            _set_aside_unproven(run, saver)
            raise
        saver.finish_save()
        run.watch.wait_while(lambda: saver.is_deleting)
    run.watch.require_output()
    if directory is not None:
        run.watch.forget_stop_file()  # one that came with the last step
        tokenizer, num_ranks = corpus.tokenizer_path, run.rank.world_size
        outcome.write_finish(config, directory, tokenizer, num_ranks, overrides, log)


def _set_aside_unproven(run: Run, saver: Saver) -> None:
    """After a numerical stop: the newest checkpoint, if no good step followed it."""
    # The deletions that a save ends with are rank 0's alone: the others would not wait so long.
    saver.finish_save()
    run.watch.wait_while(lambda: saver.is_deleting)
    older = saver.set_aside_unproven()
    if run.directory is not None and older is not None:
        outcome.note_checkpoint(run.directory, older)


def _log_nothing(text: str) -> None:
    """Ranks other than 0 are silent."""


def _memory_watched(
    config: Config, rank: Rank, device: torch.device
) -> AbstractContextManager[None]:
    if not config.debug.memory_snapshot:
        return nullcontext()
    return memory_history.snapshot_when_full(config.run_path, rank.rank, device)


def _join(config: Config, rank: Rank, log: Callable[[str], None]) -> torch.device:
    """Meet the other ranks; returns this one's device."""
    planned = faults.arm(rank.rank)
    flight_recorder.set_defaults(config.run_path)
    if config.debug.deterministic:
        log(f"deterministic algorithms only, with {determinism.enforce()}")
    try:
        device = runtime_device.start(rank, config.parallel)
    except RankFailure as error:
        if rank.rank == 0:
            outcome.write_no_meeting(config, error)
        raise
    last_words.prepare()
    for fault in planned:
        log(f"WARNING: {faults.VARIABLE} asks for {fault}")
    return device


def _machine(device: torch.device, rank: Rank) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "ranks": rank.world_size,
    }


def _saver(
    run: Run,
    state: TrainingState,
    corpus: TrainingData,
    evaluations: dict[str, TrainingData],
    latest: Path | None,
) -> Saver:
    def published(checkpoint: Path, seconds: float) -> None:
        """A checkpoint is complete, so many seconds after its save began."""
        run.watch.deadline.saw_save(seconds)
        if run.directory is not None:
            outcome.note_saved(run.directory, checkpoint)

    run_id = run.directory.facts["id"] if run.directory else None
    facts = functools.partial(manifest_facts, run.config, corpus, evaluations, run_id)
    return Saver(state, run.checkpoints, facts, run.log, published, latest)


def _meter(run: Run, state: TrainingState, corpus: TrainingData) -> Meter:
    return Meter(
        run.config,
        corpus.vocab_size,
        state.clock,
        run.device,
        stage=state.groups.pp.rank(),
        restarts=run.directory.restarts if run.directory else 0,
        log=run.log,
    )


def _architecture_watch(run: Run, state: TrainingState) -> ArchitectureWatch:
    config = state.config
    sequence = config.train.seq_length
    probe = Probe(state.chunks, state.megatron, state.groups, sequence, state.device)
    run_path = run.directory.path if run.directory else None
    return ArchitectureWatch(probe, config.model.block_size, run_path, run.watch.lose_output)
