"""What a resumed run may not change, or only when told so: asked before anything is written.

The order of the samples is a function of train.seed and train.seq_length, so that a place in it
means nothing under others. The learning rate is a function of the step: settings that make another
one of the next step make it jump.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hysparse_megatron.checkpoint import store
from hysparse_megatron.checkpoint.manifest import read_manifest
from hysparse_megatron.config.describe import type_of
from hysparse_megatron.config.frozen import CONFIG_FILE, build, load_frozen, to_tree
from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import ConfigError

_FIXED = ("seq_length", "seed")
"""Settings of `train` that the order of the samples follows from."""

_SCHEDULE = ("learning_rate", "min_learning_rate", "schedule", "warmup_steps", "decay_steps")
"""Settings of `optim` that the learning rate of a step follows from, beside train.steps."""


def recorded_settings(config: Config) -> dict[str, Any]:
    """What a manifest says of its run's settings, so that `check_continuation` can compare them."""
    tree = to_tree(config)
    settings = {section: tree[section] for section in ("train", "optim")}
    return {"settings": settings, "held_out": _held_out(config)}


def check_continuation(config: Config, directory: Path | None = None) -> list[str]:
    """Refuse to go on where `config` would make samples repeat or the learning rate jump.

    Looks at the checkpoint in `directory`, by default the one that a start in the run directory
    would go on from, as far as sizes of files tell. Reads manifests alone and changes nothing.

    Returns:
        Warnings: the learning rate jumps and `optim.accept_schedule_change` is set; evaluations
        will be of other samples than before.

    Raises:
        ConfigError: what changed, and what to do instead.
    """
    if directory is None and config.checkpoint.resume:
        directory = store.to_continue(config.run_path / "checkpoints", config.checkpoint.step)
    if directory is None:
        return []
    manifest = read_manifest(directory)
    former = _former_settings(config, manifest, directory)
    if former is None:
        return []
    _refuse_other_order(config, former, directory)
    jump = _jump(config, former, manifest["step"], directory)
    return jump + _other_held_out(config, manifest, directory)


def _former_settings(config: Config, manifest: dict[str, Any], directory: Path) -> Config | None:
    """`config` with the sections a checkpoint was written with; None if they are not known.

    Early versions left nothing but the run's config.yaml, which is that of its last start.
    """
    with contextlib.suppress(ConfigError):
        if "settings" in manifest:
            return build({**to_tree(config), **_known(manifest["settings"])})
        return load_frozen(directory.parents[1] / CONFIG_FILE)
    return None


def _known(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Without what another version had and this one has not."""
    kept = {name: value for name, value in tree.items() if type_of(prefix + name) is not None}
    return {
        name: _known(value, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in kept.items()
    }


def _refuse_other_order(config: Config, former: Config, directory: Path) -> None:
    changed = [
        f"train.{key}: {directory} was written with {old}, asked for {new}"
        for key in _FIXED
        if (old := getattr(former.train, key)) != (new := getattr(config.train, key))
    ]
    if changed:
        raise ConfigError(
            f"{'; '.join(changed)}. The order of the samples depends on it: some would be read "
            "twice and others never. Set it as it was, or start a new run_dir with "
            f"checkpoint.load={directory.parents[1]}"
        )


def _jump(config: Config, former: Config, step: int, directory: Path) -> list[str]:
    rates = changed_rate(former, config, step)
    if rates is None:
        return []
    old, new = _schedule_of(former), _schedule_of(config)
    changed = ", ".join(f"{key}: {old[key]} -> {new[key]}" for key in old if old[key] != new[key])
    text = (
        f"the learning rate of step {step + 1}, the next after {directory}, would be "
        f"{rates[1]:.6g} in place of {rates[0]:.6g} ({changed})"
    )
    if not config.optim.accept_schedule_change:
        raise ConfigError(
            f"{text}. Set the schedule as it was, or go on with the new one by "
            "optim.accept_schedule_change=true"
        )
    return [f"{text}: going on with it as optim.accept_schedule_change says"]


def _held_out(config: Config) -> dict[str, Any]:
    """What the samples of evaluations follow from, beside the data."""
    return {
        "samples": config.train.num_eval_samples,
        "document_mask": config.data.document_mask,
    }


def _other_held_out(config: Config, manifest: dict[str, Any], directory: Path) -> list[str]:
    now, batch = _held_out(config), config.train.global_batch_size
    former = {**now, **manifest.get("held_out", {})}
    changed = [f"{key}: {former[key]} -> {now[key]}" for key in now if now[key] != former[key]]
    if not changed or 0 in (former["samples"], now["samples"]):
        return []
    text = f"held-out losses will not compare with those up to {directory} ({', '.join(changed)})"
    if former["samples"] != now["samples"] and former["samples"] % batch == 0:
        text += f"; train.eval_batches={former['samples'] // batch} keeps the samples"
    return [text]


def changed_rate(former: Config, config: Config, step: int) -> tuple[float, float] | None:
    """Learning rates, by both configurations, of the step after `step` steps; None if equal."""
    if _schedule_of(former) == _schedule_of(config) or step >= config.train.steps:
        return None
    # A run that is being prolonged has no next rate: it stands at that of its last step.
    old = learning_rate(former, min(step, former.train.steps - 1))
    new = learning_rate(config, step)
    return None if math.isclose(old, new, rel_tol=1e-9) else (old, new)


def _schedule_of(config: Config) -> dict[str, Any]:
    """All settings that the learning rate follows from, by their keys."""
    optim = {f"optim.{key}": getattr(config.optim, key) for key in _SCHEDULE}
    optim["optim.schedule"] = config.optim.schedule.value
    return {**optim, "train.steps": config.train.steps}


def learning_rate(config: Config, step: int) -> float:
    """Of the update that makes step number `step` (from 0)."""
    # Imported late: it takes seconds, and a start that changes no schedule does without.
    from hysparse_megatron.training.optimizer import build_schedule, set_step

    optimizer: Any = SimpleNamespace(param_groups=[{}])
    set_step(build_schedule(config.optim, config.train, optimizer), step)
    return float(optimizer.param_groups[0]["lr"])
