"""Where a run goes on: which checkpoint, and what its manifest says of the run that wrote it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hysparse_megatron.checkpoint import choice, store
from hysparse_megatron.checkpoint.state import load_state
from hysparse_megatron.compatibility import compared_settings, weights_alone
from hysparse_megatron.config.frozen import config_hash
from hysparse_megatron.config.schema import Config
from hysparse_megatron.config.skips import Skips
from hysparse_megatron.continuation import check_continuation, recorded_settings
from hysparse_megatron.data.read.order import Position
from hysparse_megatron.data.sources import TrainingData, changed_fields
from hysparse_megatron.errors import CheckpointError, ConfigError, DataError
from hysparse_megatron.rundir import versions
from hysparse_megatron.runtime.agreement import on_rank_zero
from hysparse_megatron.training.loop import Progress
from hysparse_megatron.training.state import TrainingState

Log = Callable[[str], None]


def choose_checkpoint(config: Config, checkpoints: Path, log: Log) -> Path | None:
    """The checkpoint of this run directory to go on from, if any. Collective."""
    step, content = config.checkpoint.step, config.checkpoint.verify
    if step is not None and not on_rank_zero(
        lambda: store.went_back(checkpoints, step), CheckpointError
    ):
        if on_rank_zero(lambda: store.published(checkpoints), CheckpointError):
            return choice.resolve(checkpoints.parent, step, content)
        if config.checkpoint.load is None:
            raise CheckpointError(f"checkpoint.step={step}, but there is none in {checkpoints}")
    elif step is not None and config.checkpoint.load is None:
        log(
            f"note: checkpoint.step={step}: an earlier start went there, and this one goes on from "
            "what it has saved since. To go there once more, rename the newer checkpoints"
        )
    latest, rejected = choice.latest(checkpoints, content)
    for problem in rejected:
        log(f"WARNING: a newer checkpoint is damaged and left out: {problem}")
    return latest


def resume(
    state: TrainingState,
    latest: Path | None,
    corpus: TrainingData,
    evaluations: Mapping[str, TrainingData],
    log: Log,
) -> Progress:
    """Load the newest checkpoint of the run, or foreign weights; returns where to go on.

    `evaluations` are the sets of `data.evaluation` by name.
    """
    if latest is not None:
        facts = on_rank_zero(lambda: store.read_manifest(latest), CheckpointError)
        if "data" not in facts:
            raise weights_alone(latest)
        for line in check_data(state.config, latest, facts, corpus, evaluations):
            log(f"WARNING: {line}")
        config = state.config
        # Once more, as this may be an older checkpoint than the one that was looked at first.
        on_rank_zero(lambda: check_continuation(config, latest), ConfigError)
        step = load_state(state, latest)
        if step != facts["step"]:
            raise CheckpointError(f"{latest} holds the state after step {step}: was it renamed?")
        checkpoints = latest.parent
        for path in on_rank_zero(lambda: store.set_aside(checkpoints, step), CheckpointError):
            log(f"WARNING: newer than step {step} and set aside: {path}. Delete it if of no use")
        progress = progress_of(config, step, facts)
        log(
            f"resuming after step {step} from {latest}: {progress.position.samples:,} samples "
            "consumed"
        )
        warn_of_past_skips(config, progress, log)
        return progress
    checkpoint = state.config.checkpoint
    if checkpoint.load is not None:
        directory = choice.resolve(Path(checkpoint.load), checkpoint.step, checkpoint.verify)
        facts = on_rank_zero(lambda: store.read_manifest(directory), CheckpointError)
        for line in check_tokenizer(state.config, directory, facts, corpus):
            log(f"WARNING: {line}")
        load_state(state, directory, weights_only=True)
        log(f"starting from the weights of {directory}")
    return Progress()


def check_data(
    config: Config,
    directory: Path,
    manifest: dict[str, Any],
    corpus: TrainingData,
    evaluations: Mapping[str, TrainingData],
) -> list[str]:
    """Refuse other data than that of the run which wrote `directory`, to train or to evaluate on.

    A set of `data.evaluation` is compared with the one that had its name: losses of two texts would
    be one curve. Returns warnings where `checkpoint.accept_changed_data` is set. Raises DataError.
    """
    since = f"since {directory} was written"
    former: dict[str, dict[str, Any]] = manifest.get("evaluation_data", {})
    found = [
        (f"data.evaluation.{name} changed {since}", "give it another name", lines)
        for name, data in evaluations.items()
        if name in former and (lines := changed_fields(former[name], data.identity()))
    ]
    if lines := changed_fields(manifest["data"], corpus.identity()):
        advice = f"start a new run_dir with checkpoint.load={directory}"
        found.insert(0, (f"the data changed {since}", advice, lines))
    texts = [(f"{text}: {', '.join(lines)}", advice) for text, advice, lines in found]
    if config.checkpoint.accept_changed_data:
        return [
            f"{text}. Going on with the new data as checkpoint.accept_changed_data says"
            for text, _ in texts
        ]
    for text, advice in texts:
        raise DataError(
            f"{text}. Restore it, go on with it by checkpoint.accept_changed_data=true, or {advice}"
        )
    return []


def check_tokenizer(
    config: Config, directory: Path, manifest: dict[str, Any], corpus: TrainingData
) -> list[str]:
    """Refuse data whose ids mean other text than those that the weights in `directory` know.

    Returns a warning where `checkpoint.accept_changed_data` is set. Raises DataError.
    """
    known = store.tokenizer_facts(manifest).get("tokenizer_sha256")
    found = corpus.identity()["tokenizer_sha256"]
    if known in (None, found):
        return []
    text = (
        f"the weights of {directory} were trained with another tokenizer (SHA-256 "
        f"{str(known)[:12]}...) than {corpus.tokenizer_path} ({str(found)[:12]}...)"
    )
    if config.checkpoint.accept_changed_data:
        return [f"{text}. Going on as checkpoint.accept_changed_data says"]
    raise DataError(
        f"{text}: ids would mean other text. Name theirs by data.tokenizer, or prepare the data "
        "with it; where all ids are the same, or are to be learnt anew, set "
        "checkpoint.accept_changed_data=true"
    )


def progress_of(config: Config, step: int, manifest: dict[str, Any]) -> Progress:
    """Where the run of a manifest stood.

    Those of early versions know no samples: their batches all had one size.
    """
    facts = manifest.get("progress", {})
    try:
        if "position" in facts:
            return Progress(step, Position(**facts["position"]), facts)
        samples = manifest["tokens"] // config.train.seq_length
        # Of the last step; what is left out right after it takes the batch size of today.
        steps = Skips.parse(config.data.skip_steps).data_step(step - 1) + 1
        left_out = (steps - step) * (samples // max(step, 1))
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"the manifest of step {step} does not say how many samples were consumed: {error!r}"
        ) from error
    return Progress(step, Position(samples, left_out, steps), facts)


def warn_of_past_skips(config: Config, progress: Progress, log: Log) -> None:
    """What `data.skip_steps` names before the position can only be left out by going back."""
    named = Skips.parse(config.data.skip_steps).num_before(progress.position.steps)
    trained_on = named - (progress.position.steps - progress.step)
    if trained_on > 0:
        log(
            f"WARNING: data.skip_steps names {trained_on} steps that this run has trained on; go "
            "back before them by checkpoint.step to leave them out"
        )


def manifest_facts(
    config: Config,
    corpus: TrainingData,
    evaluations: Mapping[str, TrainingData],
    run_id: str | None,
    step: int,
    progress: dict[str, Any],
) -> dict[str, Any]:
    """What a manifest says beside the step and the files; rank 0 alone knows the run's id."""
    del step  # the writer of the manifest puts it in
    samples = progress["position"]["samples"]
    return {
        "run_id": run_id,
        "samples": samples,
        "tokens": samples * config.train.seq_length,
        "progress": progress,
        **recorded_settings(config),
        "config_hash": config_hash(config),
        **compared_settings(config),
        "data": corpus.identity(),
        "evaluation_data": {name: data.identity() for name, data in evaluations.items()},
        "parallel": dataclasses.asdict(config.parallel),
        "world_size": dist.get_world_size(),
        "versions": versions(),
        "went_back_to": config.checkpoint.step,
    }
