"""Where a run goes on: which checkpoint, and what its manifest says of the run that wrote it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hysparse_megatron.checkpoint import choice, store
from hysparse_megatron.checkpoint.state import load_state
from hysparse_megatron.compatibility import compared_settings, weights_alone
from hysparse_megatron.config.frozen import config_hash
from hysparse_megatron.config.schema import Config
from hysparse_megatron.data.sources import TrainingData, changed_fields
from hysparse_megatron.errors import CheckpointError, DataError
from hysparse_megatron.rundir import versions
from hysparse_megatron.runtime.agreement import on_rank_zero
from hysparse_megatron.training.loop import Progress
from hysparse_megatron.training.state import TrainingState

Say = Callable[[str], None]


def choose_checkpoint(config: Config, checkpoints: Path, say: Say) -> Path | None:
    """The checkpoint of this run directory to go on from, if any. Collective."""
    step, content = config.checkpoint.step, config.checkpoint.verify
    if step is not None and not on_rank_zero(
        lambda: _went_back(checkpoints, step), CheckpointError
    ):
        if on_rank_zero(lambda: store.published(checkpoints), CheckpointError):
            return choice.exactly(checkpoints, step, content)
        if config.checkpoint.load is None:
            raise CheckpointError(f"checkpoint.step={step}, but there is none in {checkpoints}")
    latest, rejected = choice.newest(checkpoints, content)
    for problem in rejected:
        say(f"WARNING: a newer checkpoint is damaged and left out: {problem}")
    return latest


def _went_back(checkpoints: Path, step: int) -> bool:
    """Whether the newest checkpoint comes from an earlier start that went back to `step`.

    The same command goes on then: it does not go back once more.
    """
    for directory in store.published(checkpoints):
        with contextlib.suppress(CheckpointError):
            return store.read_manifest(directory).get("went_back_to") == step
    return False


def resume(state: TrainingState, latest: Path | None, corpus: TrainingData, say: Say) -> Progress:
    """Load the newest checkpoint of the run, or foreign weights; returns where to go on."""
    if latest is not None:
        facts = on_rank_zero(lambda: store.read_manifest(latest), CheckpointError)
        if "data" not in facts:
            raise weights_alone(latest)
        changed = changed_fields(facts["data"], corpus.identity())
        if changed:
            text = f"the data changed since {latest} was written: {', '.join(changed)}"
            if not state.config.checkpoint.accept_changed_data:
                raise DataError(
                    f"{text}. Restore it, go on with it by checkpoint.accept_changed_data=true, or "
                    f"start a new run_dir with checkpoint.load={latest}"
                )
            say(f"WARNING: {text}. Going on with the new data as checkpoint.accept_changed_data")
        step = load_state(state, latest)
        checkpoints = latest.parent
        for path in on_rank_zero(lambda: store.set_aside(checkpoints, step), CheckpointError):
            say(f"WARNING: newer than step {step} and set aside: {path}. Delete it if of no use")
        say(f"resuming after step {step} from {latest}")
        return Progress(step, facts.get("progress", {}))
    checkpoint = state.config.checkpoint
    if checkpoint.load is not None:
        directory = choice.named(Path(checkpoint.load), checkpoint.step, checkpoint.verify)
        load_state(state, directory, weights_only=True)
        say(f"starting from the weights of {directory}")
    return Progress()


def manifest_facts(
    config: Config,
    corpus: TrainingData,
    run_id: str | None,
    step: int,
    progress: dict[str, Any],
) -> dict[str, Any]:
    """What a manifest says beside the step and the files; rank 0 alone knows the run's id."""
    return {
        "run_id": run_id,
        "tokens": step * config.train.global_batch_size * config.train.seq_length,
        "progress": progress,
        "config_hash": config_hash(config),
        **compared_settings(config),
        "data": corpus.identity(),
        "parallel": dataclasses.asdict(config.parallel),
        "world_size": dist.get_world_size(),
        "versions": versions(),
        "went_back_to": config.checkpoint.step,
    }
