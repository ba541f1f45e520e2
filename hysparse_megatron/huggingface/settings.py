"""Settings of a model as `config.json` of a Hugging Face folder has them, and back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.architecture.model import ModelConfig
from hysparse_megatron.architecture.rope import PARAMETERS, RopeType
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.frozen import schema_node
from hysparse_megatron.config.problems import as_error
from hysparse_megatron.config.schema import ParallelConfig
from hysparse_megatron.config.validate import validate
from hysparse_megatron.errors import ConfigError, Problem

CONFIG_JSON = "config.json"
MODEL_TYPE = "hysparse"

_MODEL = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "block_size": "block_size",
    "num_selected_blocks": "num_selected_blocks",
    "window": "sliding_window",
    "gate": "gate",
    "sink": "sink",
    "full_gate": "full_gate",
    "forced_first_blocks": "forced_first_blocks",
    "forced_recent_blocks": "forced_recent_blocks",
    "tie_embeddings": "tie_word_embeddings",
    "qkv_bias": "qkv_bias",
    "qk_norm": "qk_norm",
    "norm_epsilon": "rms_norm_eps",
    "init_std": "initializer_range",
    "hidden_dropout": "hidden_dropout",
}
_MOE = {
    "num_experts": "num_experts",
    "num_active_experts": "num_experts_per_tok",
    "expert_ffn_hidden_size": "moe_intermediate_size",
    "shared_expert_ffn_hidden_size": "shared_expert_intermediate_size",
    "num_dense_first_layers": "num_dense_first_layers",
    "router_score": "scoring_func",
    "router_scaling": "routed_scaling_factor",
    "balancing": "balancing",
    # Of no use to transformers, but training that goes on from the folder needs them.
    "aux_loss_coefficient": "aux_loss_coefficient",
    "bias_update_rate": "bias_update_rate",
    "z_loss_coefficient": "z_loss_coefficient",
}
"""Names of `ModelConfig` and `MoeConfig`, and those of `config.json`."""

EXPORTED = {
    "layout": ("F", "S", "W"),
    "gate": ("head", "channel"),
    "sink": ("branch", "shared", "none"),
    "full_gate": ("none", "head", "channel"),
}
"""What modeling_hysparse.py can compute, by setting."""

_AUTO_MAP = {
    "AutoConfig": "configuration_hysparse.HySparseConfig",
    "AutoModel": "modeling_hysparse.HySparseModel",
    "AutoModelForCausalLM": "modeling_hysparse.HySparseForCausalLM",
}


def to_json(model: ModelConfig, vocab_rows: int, seq_length: int, dtype: str) -> dict[str, Any]:
    """`config.json` of a model whose embedding has `vocab_rows` rows; `dtype` is the weights'.

    `seq_length` is what it was trained on, in tokens. Raises ConfigError for a layer, gate or sink
    that the modeling file does not have.
    """
    settings: dict[str, Any] = {
        "architectures": ["HySparseForCausalLM"],
        "auto_map": _AUTO_MAP,
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "vocab_size": vocab_rows,
        "layout": parse_layout(model.layout).letters,
        "max_position_embeddings": seq_length,
        "value_head_dim": model.value_dim,
    }
    settings |= {theirs: _plain(getattr(model, ours)) for ours, theirs in _MODEL.items()}
    for name, known in EXPORTED.items():
        for value in settings[name] if name == "layout" else [settings[name]]:
            if value not in known:
                raise ConfigError(
                    f"model.{name}: {value} cannot be exported: modeling_hysparse.py knows "
                    f"{', '.join(known)}"
                )
    settings["rope_parameters"] = rope_parameters(model)
    if model.moe.num_experts:
        settings |= {theirs: _plain(getattr(model.moe, ours)) for ours, theirs in _MOE.items()}
        settings["moe_intermediate_size"] = model.expert_width
    return settings


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def from_json(settings: dict[str, Any]) -> ModelConfig:
    """The inverse of `to_json`. Raises ConfigError that names what is missing or cannot be."""
    settings = {"qkv_bias": False} | settings  # which folders of early versions do not have
    missing = [name for name in ("layout", "vocab_size", *_MODEL.values()) if name not in settings]
    if missing:
        raise ConfigError(f"{CONFIG_JSON} lacks {', '.join(missing)}: it is no HySparse model's")
    if problems := unread(settings):
        raise ConfigError(f"{CONFIG_JSON}: {'; '.join(problems)}")
    tree = {ours: settings[theirs] for ours, theirs in _MODEL.items()}
    tree |= {"layout": settings["layout"], "vocab_size": settings["vocab_size"]}
    tree["value_head_dim"] = settings.get("value_head_dim")
    tree |= from_rope_parameters(_merged_rope_parameters(settings))
    if settings.get("num_experts"):
        tree["moe"] = {ours: settings[name] for ours, name in _MOE.items() if name in settings}
    return model_config(tree)


def unread(settings: Mapping[str, Any]) -> list[str]:
    """Settings that transformers knows for every model and that are not read here, with values."""
    names = ("per_layer_config", "quantization_config", "transformers_weights")
    return [
        f"{name} {settings[name]}; allowed is none"
        for name in names
        if settings.get(name) is not None
    ]


def rope_parameters(model: ModelConfig) -> dict[str, Any]:
    """The rotary embedding as transformers 5 describes one."""
    scaling, fraction = model.rope_scaling, model.rotary_fraction
    if int(model.head_dim * fraction) != model.rotary_dim:
        # transformers cuts the product off where this project rounds it.
        fraction = model.rotary_dim / model.head_dim
        while int(model.head_dim * fraction) < model.rotary_dim:
            fraction = math.nextafter(fraction, 1.0)
    kind = "default" if scaling.type is RopeType.none else scaling.type.value
    return {
        "rope_type": kind,
        "rope_theta": model.rotary_base,
        "partial_rotary_factor": fraction,
        **scaling.parameters(),
    }


def from_rope_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `rope_parameters`: the three entries of a `ModelConfig`, as plain values.

    `parameters` are merged as transformers would; one of a type that is null takes the default, but
    for `truncate`, where it is false.
    Raises ConfigError for a type that cannot be computed here and for unknown parameters.
    """
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in parameters and parameters[name] is None:
            raise ConfigError(f"{name} of the rotary embedding is null; allowed is a number")
    given = {name: value for name, value in parameters.items() if value is not None}
    if "truncate" in parameters:
        given["truncate"] = bool(parameters["truncate"])
    kind = given.pop("rope_type", None) or given.get("type", "default")
    given.pop("type", None)
    types = {"default": RopeType.none} | {one.value: one for one in RopeType}
    if kind not in tuple(types):  # a list has no hash
        raise ConfigError(
            f"rotary embedding of type {kind}; allowed default, "
            + ", ".join(one.value for one in RopeType if one is not RopeType.none)
        )
    tree: dict[str, Any] = {
        "rotary_base": given.pop("rope_theta", 10000.0),
        "rotary_fraction": given.pop("partial_rotary_factor", 1.0),
    }
    read = PARAMETERS[types[kind]]
    unknown = sorted(given.keys() - {name for names in PARAMETERS.values() for name in names})
    if unknown:
        raise ConfigError(f"rotary embedding with unknown parameters: {', '.join(unknown)}")
    # transformers fills in parameters that a type does not read, and reads over them.
    scaling = {name: value for name, value in given.items() if name in read}
    return tree | {"rope_scaling": {"type": types[kind].value, **scaling}}


def _merged_rope_parameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` of an exported folder says of its rotary embedding, in one place.

    As its `configuration_hysparse.py` reads it: `rope_scaling`, which model cards have users add,
    counts instead of `rope_parameters`, but base and share are looked for in both and beside them.
    An original length beside them comes before theirs, as in transformers.
    """
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(settings.get(name) or {}, dict):
            raise ConfigError(f"{CONFIG_JSON}: {name} {settings[name]}; allowed is an object")
    parameters = settings.get("rope_parameters") or {}
    found = dict(settings.get("rope_scaling") or parameters)
    original = "original_max_position_embeddings"
    found |= {name: settings[name] for name in (original,) if name in settings}
    for name in ("rope_theta", "partial_rotary_factor"):
        for place in (parameters, settings):
            if name in place:
                found.setdefault(name, place[name])
    if "max_position_embeddings" in settings:
        found.setdefault(original, settings["max_position_embeddings"])
    return found


def model_config(tree: dict[str, Any]) -> ModelConfig:
    """A checked `ModelConfig` of nested plain values. Raises ConfigError with all mistakes."""
    try:
        node = OmegaConf.merge(schema_node(ModelConfig), tree)
        model = cast(ModelConfig, OmegaConf.to_object(node))
    except OmegaConfBaseException as error:
        raise ConfigError(f"model: {str(error).splitlines()[0]}") from error
    if misread := list(_misread(tree, model)):
        raise as_error(misread)
    # In a run of one process, whatever the user's own presets split runs into.
    config = dataclasses.replace(compose([]), model=model, parallel=ParallelConfig())
    train = dataclasses.replace(config.train, seq_length=max(2, model.block_size))
    problems = validate(dataclasses.replace(config, train=train), world_size=1)
    found = [problem for problem in problems if problem.key.startswith("model.")]
    if found:
        raise as_error(found)
    return model


def _misread(tree: Mapping[str, Any], made: Any, place: str = "model") -> Iterator[Problem]:
    """Values that settings of a run may have in place of numbers, and transformers may not."""
    for name, value in tree.items():
        found, key = getattr(made, name), f"{place}.{name}"
        if isinstance(value, Mapping):
            yield from _misread(value, found, key)
        elif isinstance(found, bool):
            if isinstance(value, str):
                yield Problem(key, repr(value), "true or false")
        elif isinstance(found, int | float) and type(value) not in (int, float):
            yield Problem(key, repr(value), "a number")


def read_json(folder: Path, name: str = CONFIG_JSON) -> dict[str, Any]:
    """A JSON object of a Hugging Face folder. Raises ConfigError if there is none."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} is no Hugging Face folder: it has no {name}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{folder / name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{folder / name} holds no JSON object")
    return found
