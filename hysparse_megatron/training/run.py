"""A whole run on one rank: join the group, prepare data, build, resume, train, report."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hysparse_megatron.checkpoint import store
from hysparse_megatron.checkpoint.saver import Saver
from hysparse_megatron.config.frozen import config_hash
from hysparse_megatron.config.schema import VALIDATION, Config
from hysparse_megatron.config.skips import Skips
from hysparse_megatron.data.read.batches import BatchSource
from hysparse_megatron.data.read.held_out import EvaluationBatches
from hysparse_megatron.data.sources import (
    TrainingData,
    check_content,
    load_data,
    load_evaluations,
    open_samples,
)
from hysparse_megatron.errors import (
    ConfigError,
    DataError,
    HySparseError,
    NumericalStop,
    OutputError,
    Preempted,
    RankFailure,
)
from hysparse_megatron.model.probe import Probe
from hysparse_megatron.rundir import RunDirectory, amend_status
from hysparse_megatron.runtime import device as runtime_device
from hysparse_megatron.runtime import faults, flight_recorder, last_words, rendezvous
from hysparse_megatron.runtime.agreement import (
    agree_on,
    attempt_alone,
    on_rank_zero,
    require_equal,
)
from hysparse_megatron.runtime.launcher import Rank
from hysparse_megatron.status import STATES
from hysparse_megatron.tracking.architecture import ArchitectureWatch
from hysparse_megatron.tracking.meter import Meter
from hysparse_megatron.tracking.records import describe_run, recorded
from hysparse_megatron.tracking.summary import write_summary
from hysparse_megatron.training.control import STOP_FILE, Deadline, Signals, Watch
from hysparse_megatron.training.loop import Hooks, train
from hysparse_megatron.training.resume import choose_checkpoint, manifest_facts, resume
from hysparse_megatron.training.startup_log import (
    attention_backend,
    describe_evaluations,
    describe_start,
)
from hysparse_megatron.training.state import (
    TrainingState,
    build_state,
)

Say = Callable[[str], None]


def run(config: Config, rank: Rank, overrides: Sequence[str] = ()) -> None:
    """Train `config` to its end. Raises the errors of `hysparse_megatron.errors`.

    `overrides` made `config`; they appear in the commands that the summary suggests.
    """
    planned = faults.arm(rank.rank)
    flight_recorder.set_defaults(config.run_path)
    try:
        device = runtime_device.start(rank, config.parallel)
    except RankFailure as error:
        if rank.rank == 0:
            amend_status(
                config.run_path,
                os.getpid(),
                str(error),
                state="failed",
                exit_code=1,
                rank=error.rank,
            )
        raise
    last_words.prepare()
    say: Say = functools.partial(print, flush=True) if rank.rank == 0 else _say_nothing
    for fault in planned:
        say(f"WARNING: {faults.VARIABLE} asks for {fault}")
    deadline = Deadline(config.train.deadline_minutes)
    watch = Watch(device, Signals(), deadline, config.run_path / STOP_FILE)
    directory: RunDirectory | None = None
    try:
        require_equal("the configuration", config_hash(config), ConfigError)
        attention_backend(config, device)
        directory = _open_directory(config, say)
        _run_in(config, directory, device, rank, watch, say, overrides)
    except BaseException as error:
        told = last_words.explain(error)
        if directory is not None:
            _write_end(directory, told, watch)
        if told is not error:
            raise told from error
        raise
    finally:
        if directory is not None:
            directory.close()
    runtime_device.stop()


def _write_end(directory: RunDirectory, error: BaseException, watch: Watch) -> None:
    """Say in `status.json` how a run ended that did not finish. Rank 0 only."""
    ours = isinstance(error, HySparseError)
    code = error.exit_code if isinstance(error, HySparseError) else 1
    rank: int | None = None if ours else 0
    if isinstance(error, RankFailure):
        rank = error.rank
    elif isinstance(error, Preempted):
        rank = watch.stopping_rank
        watch.forget_stop_file()
    cause = str(error) if ours else f"{type(error).__name__}: {error}"
    state = STATES.get(code, "failed")
    with contextlib.suppress(OSError):  # the error itself must not be lost over a full disk
        directory.write_status(state, exit_code=code, cause=cause, rank=rank)


def _say_nothing(text: str) -> None:
    """Ranks other than 0 are silent."""


def _open_directory(config: Config, say: Say) -> RunDirectory | None:
    """Rank 0's run directory; None on the others."""
    opened: list[RunDirectory] = []
    on_rank_zero(lambda: opened.append(RunDirectory(config)), ConfigError)
    if not opened:
        return None
    if opened[0].former_owner:
        say(f"note: {opened[0].former_owner} ended without giving up {config.run_path}")
    for line in opened[0].warnings:
        say(f"WARNING: {line}")
    for line in opened[0].changed_keys:
        say(f"note: changed since the last start in {config.run_path}: {line}")
    return opened[0]


def _run_in(
    config: Config,
    directory: RunDirectory | None,
    device: torch.device,
    rank: Rank,
    watch: Watch,
    say: Say,
    overrides: Sequence[str],
) -> None:
    checkpoints = config.run_path / "checkpoints"
    if directory is not None:
        store.remove_leftovers(checkpoints)
    latest = choose_checkpoint(config, checkpoints, say)
    done = 0
    if latest is not None:
        if directory is not None:
            _note_checkpoint(directory, latest)
        done = store.read_manifest(latest)["step"]
        if done >= config.train.steps:
            if directory is not None and directory.state() != "finished":
                directory.write_status("finished", exit_code=0, step=done)  # killed at its very end
            say(f"{config.run_path} is finished: step {done} of {config.train.steps}, {latest}")
            say("train on with a larger train.steps, or start anew with another run_dir")
            return
    if directory is not None:
        directory.write_status("running", step=done)
    torch.autograd.set_detect_anomaly(config.debug.detect_anomaly)
    corpus, others = _prepare_data(config, rank, watch, say)
    state = build_state(config, corpus.vocab_size, device)
    describe_start(state, corpus, say)
    progress = resume(state, latest, corpus, say)
    on_rank_zero(lambda: directory.keep_settings() if directory else None, ConfigError)
    batches, evaluations = _batches(state, corpus, others, watch)
    describe_evaluations(evaluations, config.train.seq_length, say)

    run_id = directory.facts["id"] if directory else None
    saver = Saver(
        state,
        checkpoints,
        functools.partial(manifest_facts, config, corpus, run_id),
        say,
        functools.partial(_published, directory, watch),
        latest,
    )
    meter = Meter(
        config,
        corpus.vocab_size,
        state.clock,
        device,
        stage=state.groups.pp.rank(),
        restarts=directory.restarts if directory else 0,
        say=say,
    )
    described = describe_run(config, corpus.vocab_size, rank.world_size)
    lost = watch.lose_output
    with recorded(config, directory, progress.step, described, say, lost) as on_row:
        hooks = Hooks(
            on_row=on_row,
            measure=meter.measure,
            on_first_step=lambda: rendezvous.set_timeout(config.parallel.timeout_seconds),
            save=saver.save,
            on_good_step=saver.saw_good_step,
            poll=saver.poll,
        )
        if config.tracking.architecture:
            hooks.observe = _architecture_watch(state, directory, lost).observe
        try:
            train(state, batches, evaluations, progress, watch, hooks)
        # Raised by all ranks together, so that they can wait for each other's files.
        except (Preempted, OutputError):
            saver.finish()
            raise
        except NumericalStop:
            older = saver.set_aside_unproven()
            if directory is not None and older is not None:
                _note_checkpoint(directory, older)
            raise
        saver.finish()
    watch.require_output()
    if directory is not None:
        directory.write_status("finished", exit_code=0, step=config.train.steps)
        try:
            ranks, tokenizer = rank.world_size, corpus.tokenizer_path
            say(write_summary(config, directory, tokenizer, ranks, overrides))
        except (OSError, KeyError) as error:  # the run is done and saved
            say(f"WARNING: no summary.md: {type(error).__name__}: {error}")


def _architecture_watch(
    state: TrainingState, directory: RunDirectory | None, lost: Callable[[OSError], None]
) -> ArchitectureWatch:
    config = state.config
    sequence = config.train.seq_length
    probe = Probe(state.chunks, state.megatron, state.groups, sequence, state.device)
    run_path = directory.path if directory else None
    return ArchitectureWatch(probe, config.model.block_size, run_path, lost)


def _note_checkpoint(directory: RunDirectory, checkpoint: Path) -> None:
    manifest = checkpoint / store.MANIFEST
    step = store.read_manifest(checkpoint)["step"]
    directory.status.saw_checkpoint(step, manifest.stat().st_mtime)


def _prepare_data(
    config: Config, rank: Rank, watch: Watch, say: Say
) -> tuple[TrainingData, dict[str, TrainingData]]:
    """The corpus, and the sets of `data.evaluation` by name.

    Built by the first rank of each machine and read from the cache by the others.
    """

    def prepare() -> tuple[TrainingData, dict[str, TrainingData]]:
        faults.reach("prepare", 0)
        corpus = load_data(config.data, config.train.seed, say)
        return corpus, load_evaluations(config.data, config.train.seed, corpus, say)

    first = rank.local_rank == 0
    built = _attended(watch, lambda: prepare() if first else None)
    corpus, others = _attended(watch, lambda: built or prepare())
    require_equal("the data", corpus.fingerprint, DataError)
    for name, other in others.items():
        require_equal(f"data.evaluation.{name}", other.fingerprint, DataError)
    wanted = config.model.vocab_size
    for data in (corpus, *others.values()):
        if wanted is not None and wanted < data.num_ids:
            raise DataError(
                f"model.vocab_size is {wanted}, but ids up to {data.num_ids - 1} of the tokenizer "
                f"{data.tokenizer_path} occur, which has {data.vocab_size}; raise it, or leave it "
                "out to take the tokenizer's"
            )
    if first and config.data.verify:
        check = check_content([corpus, *others.values()], say)
        watch.data_problem = lambda: check.problem
    return corpus, others


def _attended[Result](watch: Watch, action: Callable[[], Result]) -> Result:
    """`action` on every rank, with the stop flags polled meanwhile; fails on all or none."""
    attempt = watch.attend(lambda: attempt_alone(action, DataError))
    return agree_on(attempt)


def _batches(
    state: TrainingState, corpus: TrainingData, others: dict[str, TrainingData], watch: Watch
) -> tuple[BatchSource, dict[str, EvaluationBatches]]:
    """What is trained on, and by name what is evaluated on: nothing if train.eval_batches is 0."""
    train_config = state.config.train

    def build() -> tuple[BatchSource, dict[str, EvaluationBatches]]:
        shape = {
            "global_batch_size": train_config.global_batch_size,
            "micro_batch_size": train_config.micro_batch_size,
            "data_parallel_size": state.groups.dp.size(),
            "data_parallel_rank": state.groups.dp.rank(),
            "document_mask": state.config.data.document_mask,
        }
        samples = open_samples(corpus, "train", train_config.seq_length)
        source = BatchSource(
            samples,
            seed=train_config.seed,
            fingerprint=corpus.fingerprint,
            ramp=train_config.ramp,
            skips=Skips.parse(state.config.data.skip_steps),
            **shape,
        )
        count = train_config.num_eval_samples
        evaluations = {}
        for name, data in ({VALIDATION: corpus, **others} if count else {}).items():
            held_out = open_samples(data, "validation", train_config.seq_length)
            evaluations[name] = EvaluationBatches(held_out, num_samples=count, **shape)
        return source, evaluations

    return _attended(watch, build)


def _published(
    directory: RunDirectory | None, watch: Watch, checkpoint: Path, seconds: float
) -> None:
    """A checkpoint is complete, so many seconds after its save began."""
    watch.deadline.saw_save(seconds)
    if directory is not None:
        _note_checkpoint(directory, checkpoint)
