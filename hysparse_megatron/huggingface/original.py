"""What transformers makes of the `config.json` of a model with full attention.

Its own configuration class reads the file: an architecture's defaults, the old names of settings
and the several places of rotary settings are transformers', whatever version is installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from hysparse_megatron.errors import ConfigError
from hysparse_megatron.huggingface import settings


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What differs between the model types that can be taken over."""

    qkv_bias: bool = False
    qk_norm: bool = False
    biases: tuple[str, ...] = ()
    """Settings that give its layers biases; transformers ignores them in the other types."""
    window_by_layer: bool = False
    """Whether `layer_types` alone says which layers have a sliding window."""


ARCHITECTURES = {
    "llama": Architecture(biases=("attention_bias", "mlp_bias")),
    "mistral": Architecture(),
    "qwen2": Architecture(qkv_bias=True, window_by_layer=True),
    "qwen3": Architecture(qk_norm=True, biases=("attention_bias",), window_by_layer=True),
}
"""Model types that are taken over."""


def read_original(source: Path) -> PretrainedConfig:
    """The configuration of the model in `source`, as transformers reads it.

    Raises ConfigError for another architecture, for what transformers itself refuses, and, with
    all of them, for settings that change what the model computes and that ours lacks.
    """
    settings.read_json(source)  # says what is wrong with a folder in our words
    with _refused_in_one_line(source):
        described, _ = PretrainedConfig.get_config_dict(source, local_files_only=True)
    kind = described.get("model_type")
    if kind not in tuple(ARCHITECTURES):  # a list has no hash
        raise ConfigError(
            f"a model of type {kind} cannot be adopted; allowed {', '.join(ARCHITECTURES)}"
        )
    with _refused_in_one_line(source):
        config = CONFIG_MAPPING[kind].from_dict(described)
        # As the rotary embedding of a model does: an original length beside the others counts.
        config.standardize_rope_params()
    problems = _problems(config, ARCHITECTURES[kind], described)
    if problems:
        raise ConfigError(f"this model cannot be adopted: {'; '.join(problems)}")
    return config


@contextlib.contextmanager
def _refused_in_one_line(source: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of many types, by setting and version
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{source / settings.CONFIG_JSON}: transformers refuses it: {reason}"
        ) from error


def _problems(
    config: PretrainedConfig, architecture: Architecture, described: dict[str, Any]
) -> list[str]:
    """Settings that change what transformers computes and that our layers do not have."""
    problems = settings.unread(described)
    if "per_layer_config" in described:
        return problems  # settings of the whole model may not be read
    problems += _rotary_problems(config.rope_parameters)
    # Two names of one function.
    if config.hidden_act not in ("silu", "swish"):
        problems.append(f"hidden_act {config.hidden_act}; allowed silu")
    problems += [
        f"{name}; allowed are biases of queries, keys and values alone, as in qwen2"
        for name in architecture.biases
        if getattr(config, name)
    ]
    problems += _window_problems(config, architecture, described)
    if not getattr(config, "is_causal", True):
        problems.append("is_causal false; allowed true")
    return problems


def rotary_settings(config: PretrainedConfig) -> dict[str, Any]:
    """Settings of our `ModelConfig` for the rotary embedding, as plain values."""
    rotary = dict(config.rope_parameters)
    # These architectures rotate all channels, whatever partial_rotary_factor says.
    rotary["partial_rotary_factor"] = 1.0
    if rotary["rope_type"] == "yarn" and rotary["factor"] is None:
        original = rotary["original_max_position_embeddings"]
        rotary["factor"] = config.max_position_embeddings / original
    return settings.from_rope_parameters(rotary)


def _rotary_problems(rotary: dict[str, Any]) -> list[str]:
    kind = rotary.get("rope_type")
    if kind is None:
        return [f"rope_parameters {rotary}; allowed are those of all layers together"]
    problems = []
    if kind != "default" and rotary.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(
            f"partial_rotary_factor {rotary['partial_rotary_factor']} with rope_type {kind}, "
            "which transformers cannot compute for this architecture; allowed 1"
        )
    if kind == "llama3":
        problems += [
            f"{name} is null; allowed is a number"
            for name in ("low_freq_factor", "high_freq_factor")
            if rotary.get(name) is None
        ]
    return problems


def _window_problems(
    config: PretrainedConfig, architecture: Architecture, described: dict[str, Any]
) -> list[str]:
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return [f"layer_types {', '.join(sorted(kinds))}: layers with a sliding window; {_FULL}"]
    window = getattr(config, "sliding_window", None)
    if architecture.window_by_layer or window is None:
        return []
    default = "" if "sliding_window" in described else ", transformers' value where it is not given"
    return [f"sliding_window {window}{default}: layers with a sliding window; {_FULL}"]


_FULL = "allowed are models of full attention"
