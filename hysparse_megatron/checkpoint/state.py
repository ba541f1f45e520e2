"""What a checkpoint holds, in megatron-core's sharded format.

Keys name the global layer and no rank, so tensor, pipeline and data parallel sizes may change
between save and load. Random streams and data order are functions of seed and step and need no
state of their own.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import (
    CheckpointingConfig,
    CheckpointingException,
    save_config,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException

from hysparse_megatron.checkpoint.moments import distributed_parts, taken_in_place
from hysparse_megatron.checkpoint.reader import use_for_loading
from hysparse_megatron.checkpoint.staging import StagingWriter
from hysparse_megatron.checkpoint.writer import Job
from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import CheckpointError
from hysparse_megatron.model.stack import EXTRA_STATE

_DAMAGED = (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError)
"""What it ends in to read plain values that are not those of an optimizer."""

_LOAD_ERRORS = (CheckpointException, CheckpointingException, pickle.UnpicklingError, *_DAMAGED)

_LONGEST_CAUSE = 500
"""Characters: megatron-core lists all names of a checkpoint where it misses one."""


class Saveable(Protocol):
    """What is saved of a rank's training; `training.state.TrainingState` is one."""

    config: Config
    groups: ProcessGroupCollection
    device: torch.device
    optimizer: MegatronOptimizer

    @property
    def models(self) -> list[MegatronModule]:
        """The model chunks of this rank."""

    def settle(self) -> None:
        """Bring parameters that other ranks have updated, before they are read. Collective."""


def _metadata(groups: ProcessGroupCollection) -> dict[str, Any]:
    return {
        # Layers of three kinds have different parameters: one key per layer.
        "non_homogeneous_layers": True,
        # The optimizer's moments are stored in the shape of their parameter, so that any layout
        # can load them; megatron-core's default format cannot be saved any more.
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": groups.dp_cp,
        # Experts have an optimizer of their own, which a stage of dense layers lacks: keys must not
        # count optimizers.
        "chained_optim_avoid_prefix": True,
    }


def _model_state(models: Sequence[MegatronModule], metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        f"model{index}": model.sharded_state_dict(metadata=metadata)
        for index, model in enumerate(models)
    }


def start_save(state: Saveable, step: int, directory: Path) -> Job:
    """Copy model and optimizer, to be written into an existing empty directory. Collective."""
    # megatron-core would copy, write and pass on results in ways that need helper processes.
    filesystem_async.FileSystemWriterAsync = StagingWriter
    metadata = _metadata(state.groups)
    state.settle()
    model = _model_state(state.models, metadata)
    with taken_in_place(distributed_parts(state.optimizer)):
        optimizer = state.optimizer.sharded_state_dict(model, is_loading=False, metadata=metadata)
    request = dist_checkpointing.save(
        {**model, "optimizer": optimizer, "step": step},
        str(directory),
        async_sharded_save=True,
        async_strategy="mcore",
    )
    writer: StagingWriter = request.async_fn.__self__
    # The second of them writes a file on rank 0 and leaves the others waiting should that fail.
    describe, _ = request.finalize_fns

    def finish() -> None:
        describe()
        if writer.failure is not None:
            raise writer.failure
        if dist.get_rank() == 0:
            save_config(CheckpointingConfig("torch_dist", 1), str(directory))

    return Job(write=request.async_fn, finish=finish)


def load_state(state: Saveable, directory: Path, weights_only: bool = False) -> int:
    """Load model (and optimizer) from `directory` and return the step it was saved after.

    Collective. Raises CheckpointError when the checkpoint does not fit the model.
    """
    if weights_only:
        load_weights(state.models, state.groups, directory)
        state.optimizer.reload_model_params()
        return 0
    metadata = _metadata(state.groups)
    wanted = _model_state(state.models, metadata)
    wanted["optimizer"] = state.optimizer.sharded_state_dict(
        dict(wanted), is_loading=True, metadata=metadata
    )
    loaded = _load(wanted, state.models, directory)
    try:
        _load_optimizer(state, loaded["optimizer"])
        return int(loaded["step"])
    except _DAMAGED as error:
        raise CheckpointError(
            f"{directory} holds no state of this optimizer: {type(error).__name__}: {error}"
        ) from error


def _load_optimizer(state: Saveable, loaded: dict[Any, Any]) -> None:
    # megatron-core pairs groups by their learning rates, among others, and would take the rest
    # from the checkpoint: today's settings count.
    optim = state.config.optim
    for part in _optimizer_parts(loaded):
        for group in part["optimizer"]["param_groups"]:
            today = {
                "max_lr": optim.learning_rate,
                "min_lr": optim.min_learning_rate,
                "betas": (optim.beta1, optim.beta2),
                "eps": optim.epsilon,
                "momentum": optim.muon.momentum,
            }
            # AdamW's groups have no momentum, Muon's no betas.
            group.update({name: value for name, value in today.items() if name in group})
    state.optimizer.load_state_dict(loaded)


def load_weights(
    models: Sequence[MegatronModule], groups: ProcessGroupCollection, directory: Path
) -> None:
    """Load the model chunks of this rank from `directory`, whatever layout wrote it. Collective.

    Raises CheckpointError when the checkpoint does not fit the model.
    """
    _load(_model_state(models, _metadata(groups)), models, directory)


def _load(
    wanted: dict[str, Any], models: Sequence[MegatronModule], directory: Path
) -> dict[str, Any]:
    """What `wanted` names, with the weights put into `models`."""
    use_for_loading(directory)
    try:
        loaded = dist_checkpointing.load(wanted, str(directory))
    except _LOAD_ERRORS as error:
        cause = _first_cause(error)
        if isinstance(cause, CheckpointError | pickle.UnpicklingError):
            raise CheckpointError(f"{directory} cannot be read: {cause}") from error
        raise CheckpointError(
            f"{directory} cannot be loaded into this model: {str(cause)[:_LONGEST_CAUSE]}\n"
            "model.* and optim.name must be what the checkpoint was made with; parallel.* may "
            "differ"
        ) from error
    for index, model in enumerate(models):
        _load_weights(model, loaded[f"model{index}"])
    return loaded


def _first_cause(error: BaseException) -> BaseException:
    """What failed on a rank; torch's own error is a list of tracebacks, and no Exception."""
    if isinstance(error, CheckpointException):
        return next((cause for cause, _ in error.failures.values()), error)
    return error


def _load_weights(module: torch.nn.Module, weights: dict[str, Any]) -> None:
    """All weights, and nothing else; what layers store beside weights is not in checkpoints."""
    keys = module.load_state_dict(weights, strict=False)
    missing = [key for key in keys.missing_keys if EXTRA_STATE not in key]
    if missing or keys.unexpected_keys:
        raise CheckpointError(
            f"the checkpoint does not fit the model: it lacks {missing or 'nothing'}, "
            f"and what is in it too many is {keys.unexpected_keys or 'nothing'}"
        )


def _optimizer_parts(loaded: dict[Any, Any]) -> list[dict[str, Any]]:
    """The state of each chained optimizer; a single one is not wrapped."""
    return [loaded] if "optimizer" in loaded else list(loaded.values())
