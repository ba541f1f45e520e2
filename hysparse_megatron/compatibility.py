"""Whether a run may go on from a checkpoint: compared before anything of the run is written.

A checkpoint's manifest holds the model's settings and the optimizer's name. Those written before
that are described by the run's config.yaml where that is the one they were written with, and by the
shapes of their tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf

from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.architecture.model import Balancing, ModelConfig
from hysparse_megatron.architecture.parameters import padded_vocab_size
from hysparse_megatron.checkpoint import store
from hysparse_megatron.config.frozen import CONFIG_FILE, load_frozen, schema_node, to_tree
from hysparse_megatron.config.schema import Config, OptimizerName
from hysparse_megatron.errors import CheckpointError, ConfigError, Problem

_FREE = (
    "model.backend",
    "model.layers",
    "model.fp8",
    "model.init_std",
    "model.hidden_dropout",
    "model.moe.aux_loss_coefficient",
    "model.moe.bias_update_rate",
    "model.moe.z_loss_coefficient",
)
"""Settings of a model that say how it is computed or trained, and not what it is."""

_FREE_FOR_WEIGHTS = (
    "model.rotary_base",
    "model.rope_scaling.",
    "model.window",
    "model.block_size",
    "model.num_selected_blocks",
    "model.forced_first_blocks",
    "model.forced_recent_blocks",
    "model.moe.num_active_experts",
    "optim.name",
)
"""What a new run may change that takes the weights alone, as for a stage of longer sequences."""

_MOST_LINES = 20
"""Differences that are written out; a model has hundreds of tensors."""


def compared_settings(config: Config) -> dict[str, Any]:
    """What a manifest says of its run's settings, so that `refuse_mismatch` can compare them."""
    tree = to_tree(config)
    return {"model": tree["model"], "optim": {"name": tree["optim"]["name"]}}


def refuse_mismatch(config: Config) -> None:
    """Raise ConfigError, naming all differences, where a start would go on from another model.

    Looks at the checkpoint of the run directory that it would continue, else at the one that
    `checkpoint.load` names. Reads manifests alone, and of checkpoints of early versions names and
    shapes. Damaged ones are passed over here: who loads them tells. Raises CheckpointError where
    the run directory holds weights to start from, which cannot be continued.
    """
    directory = None
    if config.checkpoint.resume:
        # Whatever step is asked for: all checkpoints of a run are of one model.
        directory = store.to_continue(config.run_path / "checkpoints", None)
    if directory is not None:
        if "data" not in store.read_manifest(directory):
            raise weights_alone(directory)
        _refuse(config, directory, weights_only=False)
    elif config.checkpoint.load is not None:
        directory = _named(Path(config.checkpoint.load), config.checkpoint.step)
        if directory is not None:
            _refuse(config, directory, weights_only=True)


def require_same_model(config: Config, directory: Path) -> None:
    """Raise CheckpointError, naming all differences, where `config` describes another model.

    For settings that come from a run's config.yaml, beside which the checkpoint lies.
    """
    problems = [found for found in mismatches(config, directory) if found.key != "optim.name"]
    if problems:
        lines = _lines(problems, f"{CONFIG_FILE} has")
        raise CheckpointError(
            "\n".join([f"{directory} was made with other settings than the run's:", *lines])
        )


def weights_alone(directory: Path) -> CheckpointError:
    """The error for a checkpoint without optimizer in the place of one to go on from."""
    return CheckpointError(
        f"{directory} holds weights alone and cannot be continued: start a new run_dir with "
        f"checkpoint.load={directory.parents[1]}"
    )


def mismatches(config: Config, directory: Path, weights_only: bool = False) -> list[Problem]:
    """Every setting that the checkpoint has otherwise: its key, what is `got`, what is `allowed`.

    With `weights_only` what weights do not depend on is left out. Raises CheckpointError where the
    checkpoint cannot be read.
    """
    manifest = store.read_manifest(directory)
    known = store.tokenizer_facts(manifest).get("vocab_size")
    recorded = _recorded(manifest, directory, known)
    if recorded is None:
        return _other_tensors(config, directory, known)
    free = _FREE + (_FREE_FOR_WEIGHTS if weights_only else ())
    before, now = _flat(recorded), _flat(compared_settings(config))
    problems = [
        Problem(key, str(now[key]), str(before[key]))
        for key in now
        if key in before and before[key] != now[key] and not key.startswith(free)
    ]
    has = recorded["model"].get("vocab_size") or known
    asked = config.model.vocab_size or (None if weights_only else known)
    if has and asked and padded_vocab_size(has) != padded_vocab_size(asked):
        problems.append(Problem("model.vocab_size", str(asked), str(has)))
    return problems


def _refuse(config: Config, directory: Path, weights_only: bool) -> None:
    problems = mismatches(config, directory, weights_only)
    if not problems:
        return
    where, advice = "this run would go on from", "choose another run_dir for another model"
    if weights_only:
        where, advice = "checkpoint.load names", "load the weights of another run"
    elif all(problem.key.startswith(_FREE_FOR_WEIGHTS) for problem in problems):
        advice = f"start another run_dir from its weights: checkpoint.load={directory.parents[1]}"
    raise ConfigError(
        "\n".join(
            [
                f"{directory}, which {where}, was made with other settings:",
                *_lines(problems, "asked for"),
                f"Set them as the checkpoint has them, or {advice}. Nothing was changed",
            ]
        ),
        problems,
    )


def _lines(problems: list[Problem], other: str) -> list[str]:
    lines = [
        f"  {problem.key}: the checkpoint has {problem.allowed}, {other} {problem.got}"
        for problem in problems[:_MOST_LINES]
    ]
    left_out = len(problems) - _MOST_LINES
    return [*lines, f"  and {left_out} more"] if left_out > 0 else lines


def _named(path: Path, step: int | None) -> Path | None:
    """What `checkpoint.load` means by a step or run directory; None where that is not whole."""
    if not store.is_checkpoint(path) and step is None:
        return store.to_continue(path / "checkpoints", None)
    directory = path
    if not store.is_checkpoint(path):
        directory = store.step_directory(path / "checkpoints", step or 0)
    return None if store.problems_of(directory, content=False) else directory


def _recorded(
    manifest: Mapping[str, Any], directory: Path, vocab_size: int | None
) -> dict[str, Any] | None:
    """The settings that a checkpoint was written with, as `compared_settings` gives them.

    Without a word of its manifest those of the run's config.yaml, unless another start has written
    that since; one that differs in no tensor passes for the right one. None if there is none.
    """
    if "model" in manifest:
        return {"optim": {}, **manifest}
    path = directory.parent.parent / CONFIG_FILE
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == manifest.get("config_hash"):
            return yaml.safe_load(content)
        config = load_frozen(path)
    except (OSError, ConfigError):
        return None
    return None if _other_tensors(config, directory, vocab_size) else compared_settings(config)


def _other_tensors(config: Config, directory: Path, vocab_size: int | None) -> list[Problem]:
    """Tensors that the model of `config` has and the checkpoint has not, or the other way round."""
    # Imported late: they need torch, which takes seconds, and only old checkpoints need them.
    from hysparse_megatron.checkpoint import tensors
    from hysparse_megatron.huggingface.weights import EMBEDDING, model_weights

    index = tensors.read_index(directory)
    found = {
        name: entry["shape"]
        for name, entry in index.items()
        if not name.startswith(tensors.OPTIMIZER)
    }
    size = config.model.vocab_size or vocab_size
    rows = padded_vocab_size(size) if size else found.get(EMBEDDING, [0])[0]
    wanted = {weight.name: list(weight.shape) for weight in model_weights(config.model, rows)}
    problems = [
        Problem(name, str(wanted.get(name, "nothing")), str(found.get(name, "nothing")))
        for name in {**wanted, **found}
        if wanted.get(name) != found.get(name)
    ]
    momentum = f"{tensors.OPTIMIZER}state.momentum_buffer."
    is_muon = any(name.startswith(momentum) for name in index)
    name = OptimizerName.muon if is_muon else OptimizerName.adamw
    if len(index) > len(found) and config.optim.name is not name:
        problems.append(Problem("optim.name", config.optim.name.value, name.value))
    return problems


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`model.key: value` pairs, defaults resolved, without what makes no difference."""
    flat = {**_leaves(_defaults(), "model."), **_leaves(settings["model"], "model.")}
    layout = parse_layout(flat["model.layout"])
    flat["model.layout"] = layout.letters
    if flat["model.value_head_dim"] is None:
        flat["model.value_head_dim"] = flat["model.head_dim"]
    if flat["model.moe.expert_ffn_hidden_size"] is None:
        flat["model.moe.expert_ffn_hidden_size"] = flat["model.ffn_hidden_size"]
    if flat["model.moe.balancing"] != Balancing.bias.value:
        flat["model.moe.balancing"] = "another than bias"
    if flat["model.moe.num_experts"] == 0:
        unused = [key for key in flat if key.startswith("model.moe.") and "num_experts" not in key]
        for key in unused:
            del flat[key]
    del flat["model.vocab_size"]
    name = settings.get("optim", {}).get("name")
    return {**flat, "optim.name": name} if name else flat


def _leaves(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, dict)
        leaves |= _leaves(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return leaves


def _defaults() -> dict[str, Any]:
    """Of a model's settings: what one that is newer than a checkpoint was then."""
    tree: Any = OmegaConf.to_container(schema_node(ModelConfig), enum_to_str=True)
    return tree
