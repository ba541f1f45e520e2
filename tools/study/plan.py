"""What a study consists of: variants x seeds, one run each, described by one file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import ConfigError

_KEYS = {"name", "tokens", "seeds", "baseline", "settings", "variants", "evaluations", "metrics"}


@dataclass(frozen=True)
class Run:
    """One training of a study: a variant and a seed, or several of them."""

    variant: str
    seed: int
    overrides: tuple[str, ...]
    """For the ordinary training command, without data and run directory."""

    @property
    def name(self) -> str:
        """Of its folder and its results."""
        return f"{self.variant}-seed{self.seed}"

    def fingerprint(self, data: str) -> str:
        """Of what decides its results: the settings, and the training data's own fingerprint."""
        return hashlib.sha256(json.dumps([*self.overrides, data]).encode()).hexdigest()


@dataclass(frozen=True)
class Study:
    """A study file, checked. Made by `read_study`."""

    name: str
    tokens: int
    """Budget of every run, in tokens; rounded up to whole steps."""
    seeds: tuple[int, ...]
    baseline: str
    """The variant that the others are compared with, seed by seed."""
    settings: tuple[str, ...]
    variants: Mapping[str, tuple[str, ...]]
    evaluations: Mapping[str, str]
    """Name to a command with {run}, {data} and {output}."""
    metrics: Mapping[str, str]
    """Title to the path of a number in an evaluation's JSON, dots between keys and places."""

    def runs(self) -> list[Run]:
        """All runs, those of the first seed first: a comparison stands after the first portion."""
        return [self._run(variant, seed) for seed in self.seeds for variant in self.variants]

    def _run(self, variant: str, seed: int) -> Run:
        overrides = (*self.settings, *self.variants[variant], f"train.seed={seed}")
        config = _composed([*overrides, "train.steps=1000000"])
        step_tokens = config.train.global_batch_size * config.train.seq_length
        return Run(
            variant, seed, (*overrides, f"train.steps={math.ceil(self.tokens / step_tokens)}")
        )


def _composed(overrides: Sequence[str]) -> Config:
    return compose([*overrides, "name=study"])


def read_study(path: Path) -> Study:
    """The study of a file.

    Raises ConfigError for a file that is none, an unknown key, a baseline that is no variant or
    settings that the training command refuses.
    """
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a study: {error}") from error
    if not isinstance(content, dict) or set(content) != _KEYS:
        got = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"{path}: got {got}; a study has {sorted(_KEYS)}")
    study = Study(
        name=str(content["name"]),
        tokens=int(content["tokens"]),
        seeds=tuple(int(seed) for seed in content["seeds"]),
        baseline=str(content["baseline"]),
        settings=tuple(content["settings"]),
        variants={name: tuple(given) for name, given in content["variants"].items()},
        evaluations=dict(content["evaluations"]),
        metrics=dict(content["metrics"]),
    )
    if study.baseline not in study.variants:
        known = ", ".join(study.variants)
        raise ConfigError(f"{path}: baseline {study.baseline} is no variant; there are {known}")
    study.runs()  # composes every variant
    return study
