"""A run's model, ready to generate: any checkpoint, on one process or split over tensor ranks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.architecture.model import Backend, Fp8, Layers, ModelConfig
from hysparse_megatron.checkpoint import choice, store
from hysparse_megatron.checkpoint.state import load_weights
from hysparse_megatron.compatibility import require_same_model
from hysparse_megatron.config.frozen import CONFIG_FILE, load_frozen
from hysparse_megatron.config.parallel import resized
from hysparse_megatron.config.problems import as_error
from hysparse_megatron.config.schema import Config, OptimizerName, Recompute
from hysparse_megatron.config.validate import plan_problems
from hysparse_megatron.data.run_tokenizer import with_own_tokenizer
from hysparse_megatron.errors import CheckpointError, HySparseError
from hysparse_megatron.model.builder import build_chunks
from hysparse_megatron.model.layers import resolve_layers
from hysparse_megatron.model.megatron_config import make_megatron_config
from hysparse_megatron.runtime import device as runtime_device
from hysparse_megatron.runtime.agreement import on_rank_zero
from hysparse_megatron.runtime.launcher import Rank
from hysparse_megatron.runtime.process_groups import build_process_groups, destroy_process_groups


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, and where it comes from."""

    config: Config
    """The run's, with the parallel sizes of now."""
    model: HybridModel
    groups: ProcessGroupCollection
    device: torch.device
    vocab_size: int
    """Ids that the run's tokenizer has; the model's vocabulary is padded beyond."""
    checkpoint: Path
    tokenizer_sha256: str | None
    """Of the tokenizer's file; None in a checkpoint that does not say."""
    data: dict[str, Any] = field(default_factory=dict)
    """Identity of the data that it was trained on; empty in a checkpoint that does not say."""
    held_out: dict[str, Any] = field(default_factory=dict)
    """`samples` and `document_mask` of the evaluations beside it; may be empty likewise."""

    @property
    def num_eval_samples(self) -> int:
        """Sequences of an evaluation in training, at most; a later start may have had others."""
        return int(self.held_out.get("samples", self.config.train.num_eval_samples))

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer."""
        return parse_layout(self.config.model.layout).kinds

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.model.config.params_dtype


def inference_config(run_dir: Path, world_size: int) -> Config:
    """The configuration of a run with all ranks tensor parallel, experts spread over them.

    `run_dir` may also be a folder of weights to start from, which has a tokenizer of its own.
    Raises ConfigError if there is no configuration or the model cannot be split so.
    """
    config = load_frozen(run_dir / CONFIG_FILE)
    experts = config.model.moe.num_experts
    spread = world_size if experts and experts % world_size == 0 else 1
    config = dataclasses.replace(
        config,
        data=with_own_tokenizer(config.data, run_dir),
        model=_anywhere(config.model),
        train=dataclasses.replace(config.train, recompute=Recompute.none),
        optim=dataclasses.replace(config.optim, name=OptimizerName.adamw),
        parallel=resized(config.parallel, tp=world_size, ep=spread),
    )
    problems = [
        problem
        for problem in plan_problems(config, world_size=world_size)
        # Training with experts needs it; here every rank routes all tokens.
        if problem.key != "parallel.sequence_parallel"
    ]
    if problems:
        raise as_error(problems)
    return config


def _anywhere(model: ModelConfig) -> ModelConfig:
    """The same model on any device: auto takes what was asked for by name where that can run."""
    is_triton, is_te = model.backend is Backend.triton, model.layers is Layers.te
    return dataclasses.replace(
        model,
        layout=parse_layout(model.layout).letters,
        fp8=Fp8.none,
        backend=Backend.auto if is_triton else model.backend,
        layers=Layers.auto if is_te else model.layers,
    )


@contextlib.contextmanager
def loaded_run(
    rank: Rank, config: Config, run_dir: Path, checkpoint: str = "newest", verify: bool = True
) -> Iterator[LoadedModel]:
    """Join the ranks, load a run's model, and leave again. Arguments and errors: `load_model`."""
    device = runtime_device.start(rank, config.parallel)
    try:
        yield load_model(config, device, run_dir, checkpoint, verify)
    except HySparseError:  # of all ranks together; after a crash nobody may wait for anybody
        _leave()
        raise
    _leave()


def _leave() -> None:
    destroy_process_groups()
    runtime_device.stop()


def load_model(
    config: Config, device: torch.device, run_dir: Path, checkpoint: str, verify: bool = True
) -> LoadedModel:
    """Build the model and load its weights, whatever layout saved them. Collective.

    Args:
        config: as `inference_config` made it.
        device: as `runtime.device.start` returned it.
        run_dir: of the run.
        checkpoint: `newest` of the run, a step, or the path of a checkpoint.
        verify: compare the content of every file with its hash; sizes always are.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged or of another model.
    """
    directory = choice.resolve(*store.meant(run_dir, checkpoint), verify)
    on_rank_zero(lambda: require_same_model(config, directory), CheckpointError)
    manifest = on_rank_zero(lambda: store.read_manifest(directory), CheckpointError)
    known = store.tokenizer_facts(manifest)
    sizes = known.get("vocab_size"), config.model.vocab_size
    vocab_size = min(filter(None, sizes), default=None)
    if vocab_size is None:
        raise CheckpointError(f"{directory}: neither its manifest nor model.vocab_size has a size")
    model, groups = build_model(config, device, config.model.vocab_size or vocab_size)
    load_weights([model], groups, directory)
    return LoadedModel(
        config,
        model,
        groups,
        device,
        vocab_size,
        directory,
        known.get("tokenizer_sha256"),
        manifest.get("data", {}),
        manifest.get("held_out", {}),
    )


def build_model(
    config: Config, device: torch.device, vocab_size: int
) -> tuple[HybridModel, ProcessGroupCollection]:
    """The model that `config` describes, in evaluation mode, with weights of any kind. Collective.

    Arguments as those of `load_model`; `vocab_size` before padding.
    """
    groups = build_process_groups(config.parallel, config.model.num_query_groups)
    layers = resolve_layers(config.model, device)
    megatron = make_megatron_config(config, layers)
    # The fused rotation knows one position a row of tokens; prompts have many lengths to compile.
    megatron.apply_rope_fusion = megatron.compiled_inputs = False
    (model,) = build_chunks(config, megatron, vocab_size, groups, layers, draw=False)
    # No buffer, which `to` would move; a step that is recorded must not copy it.
    model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq.to(device)
    return model.to(device).eval(), groups
