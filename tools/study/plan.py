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
    variants: tuple[str, ...]
    evaluations: Mapping[str, str]
    """Name to a command with {run}, {data} and {output}."""
    metrics: Mapping[str, str]
    """Title to the path of a number in an evaluation's JSON, dots between keys and places."""
    runs: tuple[Run, ...]
    """All runs, those of the first seed first: a comparison stands after the first portion."""


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
    try:
        study = _parse(content)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path}: {error}; a study has numbers in tokens and seeds, lists of overrides in "
            "settings and variants, texts in evaluations and metrics"
        ) from error
    if study.baseline not in study.variants:
        known = ", ".join(study.variants)
        raise ConfigError(f"{path}: baseline {study.baseline} is no variant; there are {known}")
    return study


def _parse(content: dict[str, Any]) -> Study:
    tokens, seeds = int(content["tokens"]), [int(seed) for seed in content["seeds"]]
    settings = tuple(content["settings"])
    by_variant = {
        name: (*settings, *given, f"train.steps={_num_steps([*settings, *given], tokens)}")
        for name, given in content["variants"].items()
    }
    return Study(
        name=str(content["name"]),
        tokens=tokens,
        seeds=tuple(seeds),
        baseline=str(content["baseline"]),
        variants=tuple(by_variant),
        evaluations=dict(content["evaluations"]),
        metrics=dict(content["metrics"]),
        runs=tuple(
            Run(variant, seed, (*overrides, f"train.seed={seed}"))
            for seed in seeds
            for variant, overrides in by_variant.items()
        ),
    )


def _num_steps(overrides: Sequence[str], tokens: int) -> int:
    train = compose([*overrides, "train.steps=1000000"]).train
    return math.ceil(tokens / (train.global_batch_size * train.seq_length))
