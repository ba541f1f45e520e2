"""Everything a rank trains with, built once from the configuration."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from hysparse_megatron.config.rules.optim import MUON_PACKAGE
from hysparse_megatron.config.schema import Config, OptimizerName
from hysparse_megatron.model.builder import build_chunks
from hysparse_megatron.model.experts import ExpertLoads
from hysparse_megatron.model.layers import LayerChoice, fuse_weight_gradients, resolve_layers
from hysparse_megatron.model.megatron_config import HySparseConfig, make_megatron_config
from hysparse_megatron.model.pipeline import PayloadCommunicator
from hysparse_megatron.runtime.clock import ForwardClock
from hysparse_megatron.runtime.process_groups import build_process_groups
from hysparse_megatron.runtime.random import seed_step
from hysparse_megatron.training import data_parallel
from hysparse_megatron.training.muon import is_matrix
from hysparse_megatron.training.optimizer import adam_name, build_optimizer, build_schedule


@dataclass
class TrainingState:
    """One rank's share of the model and what steps it."""

    config: Config
    megatron: HySparseConfig
    groups: ProcessGroupCollection
    device: torch.device
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    communicator: PayloadCommunicator | None
    """How pipeline neighbours talk; None without pipeline parallelism."""
    layers: LayerChoice
    """Whose linear layers, norms and experts the model is made of."""
    loads: ExpertLoads | None
    """How busy the experts are; None in a dense model."""
    clock: ForwardClock
    """How long this rank's forward passes of training take."""
    build_seconds: float
    """What building the model and drawing its weights took."""

    @property
    def models(self) -> list[MegatronModule]:
        """The chunks without what wraps them for training."""
        return [chunk.module for chunk in self.chunks]

    def settle(self) -> None:
        """Bring parameters that other ranks have updated, before they are read. Collective."""
        data_parallel.settle(self.chunks)

    def num_parameters(self) -> int:
        """Parameters on this rank (a tied output projection counts on its stage too)."""
        return sum(p.numel() for chunk in self.chunks for p in chunk.parameters())


def rows_per_rank(config: Config) -> int:
    """Tokens per sequence in one rank's residual stream."""
    parallel = config.parallel
    return config.train.seq_length // (
        parallel.cp * (parallel.tp if parallel.sequence_parallel else 1)
    )


def describe_optimizer(state: TrainingState) -> str:
    """Which implementations update what."""
    adam = adam_name(state.optimizer)
    if state.config.optim.name is not OptimizerName.muon:
        return adam
    count = sum(is_matrix(p) for chunk in state.chunks for p in chunk.parameters())
    version = importlib.metadata.version(MUON_PACKAGE)
    return f"Muon ({MUON_PACKAGE} {version}) for {count} matrices of rank 0, {adam} for the rest"


def build_state(
    config: Config,
    vocab_size: int,
    device: torch.device,
    build: Callable[..., Sequence[MegatronModule]] = build_chunks,
) -> TrainingState:
    """Build groups, model, optimizer and schedule. Collective over the default process group.

    `vocab_size` is the data's; `config.model.vocab_size` overrides it if set. `build` takes what
    `build_chunks` takes.
    """
    vocab_size = config.model.vocab_size or vocab_size
    groups = build_process_groups(config.parallel, config.model.num_query_groups)
    layers = replace(
        resolve_layers(config.model, device),
        sums_weight_gradients=not config.train.saves_weights_by_hooks,
    )
    megatron = make_megatron_config(config, layers)
    started = time.monotonic()
    models = [model.to(device) for model in build(config, megatron, vocab_size, groups, layers)]
    torch.cuda.synchronize()
    build_seconds = time.monotonic() - started
    for model in models:
        fuse_weight_gradients(layers, model)
    clock = ForwardClock(device)
    chunks = data_parallel.wrap(config, megatron, models, groups, clock)
    optimizer = build_optimizer(config.optim, config.train.precision, chunks)
    # Megatron-core's random streams must exist before the first forward pass, evaluation included.
    seed_step(config.train.seed, 0, groups)
    communicator = None
    if config.parallel.pp > 1:
        communicator = PayloadCommunicator(
            groups.pp, megatron, rows_per_rank(config), config.train.micro_batch_size
        )
    return TrainingState(
        config=config,
        megatron=megatron,
        groups=groups,
        device=device,
        chunks=chunks,
        optimizer=optimizer,
        schedule=build_schedule(config.optim, config.train, optimizer),
        communicator=communicator,
        layers=layers,
        loads=ExpertLoads(megatron, chunks) if config.model.moe.num_experts else None,
        clock=clock,
        build_seconds=build_seconds,
    )
