"""What a run directory says, read without torch and without the run's own code version.

Configurations are plain trees here, so that runs of other versions can be looked at.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from hysparse_megatron.checkpoint import store
from hysparse_megatron.config.frozen import CONFIG_FILE
from hysparse_megatron.config.schema import VALIDATION
from hysparse_megatron.errors import CheckpointError, ConfigError
from hysparse_megatron.run_record import RECORD_FILE, read_record
from hysparse_megatron.status import read_status
from hysparse_megatron.tracking.metrics import by_evaluation, read_metrics

Row = dict[str, Any]
Points = tuple[list[int], list[float]]
"""Steps, and a value at each."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a run, as far as its manifest tells."""

    step: int
    num_bytes: int
    manifest: dict[str, Any]
    problem: str | None
    """What is wrong with it by names and sizes; None if nothing is."""


@dataclass(frozen=True)
class RunData:
    """A run directory."""

    path: Path
    config: dict[str, Any]
    record: dict[str, Any]
    """`run.json`."""
    status: dict[str, Any]
    """`status.json`; empty if there is none."""
    steps: list[Row]
    evaluations: list[Row]
    """On the run's own validation split."""
    named_evaluations: dict[str, list[Row]]
    """On the sets of `data.evaluation`, by name."""
    checkpoints: list[Checkpoint]
    """Ascending."""

    @property
    def name(self) -> str:
        """That of the configuration."""
        return str(self.config.get("name", self.path.name))

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Records of all starts."""
        return self.record.get("starts", [])

    @property
    def config_hash(self) -> str | None:
        """Of the last start."""
        return self.starts[-1].get("config_hash") if self.starts else None

    @property
    def data(self) -> Any:
        """Identity of the data by the newest checkpoint; None without one."""
        known = [c.manifest["data"] for c in self.checkpoints if "data" in c.manifest]
        return known[-1] if known else None

    def layer_values(self) -> dict[str, dict[int, Points]]:
        """Architecture metrics of evaluations: by quantity and layer, steps and values."""
        found: dict[str, dict[int, Points]] = {}
        for row in self.evaluations:
            for key, value in row.items():
                quantity, _, layer = key.partition("/layer_")
                if layer.isdecimal():
                    steps, values = found.setdefault(quantity, {}).setdefault(int(layer), ([], []))
                    steps.append(row["step"])
                    values.append(value)
        return found


def load_run(path: Path) -> RunData:
    """Read a run directory. Raises ConfigError if it is none."""
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise ConfigError(f"{path} is no run directory: it has no metrics.jsonl")
    checkpoints = reversed(store.published(path / "checkpoints"))
    try:
        rows = read_metrics(metrics)
        config = yaml.safe_load((path / CONFIG_FILE).read_text())
        record = read_record(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is no whole run directory: {error}") from error
    sections = ("model", "parallel", "train")
    if not isinstance(config, dict) or not all(
        isinstance(config.get(name, {}), dict) for name in sections
    ):
        raise ConfigError(f"{path}: {CONFIG_FILE} must hold keys and values in sections")
    if not record:
        text = f"warning: {path / RECORD_FILE} is damaged or not there: its starts are left out"
        print(text, file=sys.stderr)
    by_name = by_evaluation(rows)
    return RunData(
        path=path,
        config=config,
        record=record or {},
        status=read_status(path),
        steps=[row for row in rows if "loss" in row],
        evaluations=by_name.pop(VALIDATION, []),
        named_evaluations=by_name,
        checkpoints=[_checkpoint(found) for found in checkpoints],
    )


def _checkpoint(directory: Path) -> Checkpoint:
    problems = store.problems_of(directory, content=False)
    manifest: dict[str, Any] = {}
    try:
        manifest = store.read_manifest(directory)
    except CheckpointError as error:
        problems = problems or [str(error)]
    step, size = store.step_of(directory), store.size_of(directory)
    return Checkpoint(step, size, manifest, "; ".join(problems) or None)


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a configuration."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def points(rows: Sequence[Row], key: str) -> Points:
    """Steps and values of a field, of the rows that have it."""
    having = [row for row in rows if isinstance(row.get(key), int | float)]
    return [row["step"] for row in having], [float(row[key]) for row in having]


def smoothed(found: Points) -> Points:
    """Each value with those before it, in a mean that forgets over a fiftieth of the run.

    Values that are not finite are left out.
    """
    steps, values = [], []
    forget, total, weight = 1 / max(1.0, len(found[0]) / 50), 0.0, 0.0
    for step, value in zip(*found, strict=True):
        if math.isfinite(value):
            total = (1 - forget) * total + forget * value
            weight = (1 - forget) * weight + forget
            steps.append(step)
            values.append(total / weight)
    return steps, values
