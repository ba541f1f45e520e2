"""Settings of a model as `config.json` of a Hugging Face folder has them, and back."""

from __future__ import annotations

import dataclasses
import json
from enum import Enum
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.frozen import schema_node
from hysparse_megatron.config.problems import as_error
from hysparse_megatron.config.schema import ModelConfig
from hysparse_megatron.config.validate import validate
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.layout import parse_layout

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
    "rotary_base": "rope_theta",
    "rotary_fraction": "partial_rotary_factor",
    "tie_embeddings": "tie_word_embeddings",
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

_AUTO_MAP = {
    "AutoConfig": "configuration_hysparse.HySparseConfig",
    "AutoModel": "modeling_hysparse.HySparseModel",
    "AutoModelForCausalLM": "modeling_hysparse.HySparseForCausalLM",
}


def to_json(model: ModelConfig, vocab_rows: int, seq_length: int, dtype: str) -> dict[str, Any]:
    """`config.json` of a model whose embedding has `vocab_rows` rows of `dtype`.

    `seq_length` is what it was trained on, in tokens.
    """
    settings = {
        "architectures": ["HySparseForCausalLM"],
        "auto_map": _AUTO_MAP,
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "vocab_size": vocab_rows,
        "layout": "".join(plan.kind.value for plan in parse_layout(model.layout).layers),
        "max_position_embeddings": seq_length,
        "value_head_dim": model.value_dim,
    }
    settings |= {theirs: _plain(getattr(model, ours)) for ours, theirs in _MODEL.items()}
    if model.moe.num_experts:
        settings |= {theirs: _plain(getattr(model.moe, ours)) for ours, theirs in _MOE.items()}
        settings["moe_intermediate_size"] = model.expert_width
    return settings


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def from_json(settings: dict[str, Any]) -> ModelConfig:
    """The inverse of `to_json`. Raises ConfigError that names what is missing or cannot be."""
    missing = [name for name in ("layout", "vocab_size", *_MODEL.values()) if name not in settings]
    if missing:
        raise ConfigError(f"{CONFIG_JSON} lacks {', '.join(missing)}: it is no HySparse model's")
    tree = {ours: settings[theirs] for ours, theirs in _MODEL.items()}
    tree |= {"layout": settings["layout"], "vocab_size": settings["vocab_size"]}
    tree["value_head_dim"] = settings.get("value_head_dim")
    if settings.get("num_experts"):
        tree["moe"] = {ours: settings[name] for ours, name in _MOE.items() if name in settings}
    return model_config(tree)


def model_config(tree: dict[str, Any]) -> ModelConfig:
    """A checked `ModelConfig` of nested plain values. Raises ConfigError with all mistakes."""
    try:
        node = OmegaConf.merge(schema_node(ModelConfig), tree)
        model = cast(ModelConfig, OmegaConf.to_object(node))
    except OmegaConfBaseException as error:
        raise ConfigError(f"model: {str(error).splitlines()[0]}") from error
    # In a run of one process whose other settings are the defaults.
    config = dataclasses.replace(compose([]), model=model)
    train = dataclasses.replace(config.train, seq_length=max(2, model.block_size))
    problems = validate(dataclasses.replace(config, train=train), world_size=1)
    found = [problem for problem in problems if problem.key.startswith("model.")]
    if found:
        raise as_error(found)
    return model


def read_json(folder: Path, name: str = CONFIG_JSON) -> dict[str, Any]:
    """A JSON object of a Hugging Face folder. Raises ConfigError if there is none."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} is no Hugging Face folder: it has no {name}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{folder / name} holds no JSON object")
    return found
