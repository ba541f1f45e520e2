"""From a Llama- or Qwen-like model with full attention to a HySparse model that trains on.

Full layers, feed-forward layers, norms and embeddings keep their weights to the bit. A sparse layer
keeps q, k, v and o as its window branch. Its gates have no bias, so with weights of zero each is
one half, and o doubled makes the window branch whole: where the window covers the text, the layer
is what it was. The sparse branch reads keys and values of another layer, of which its weights know
nothing: its sink, a logit beside those of its tokens, leaves it a small share at the start.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hysparse_megatron.checkpoint.assemble import Source
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.huggingface import settings
from hysparse_megatron.huggingface.importing import check_names, padded, write_start
from hysparse_megatron.huggingface.reading import TensorFolder
from hysparse_megatron.huggingface.weights import Fused, model_weights
from hysparse_megatron.layout import LayerKind, parse_layout

ARCHITECTURES = {"llama": False, "mistral": False, "qwen3": True}
"""Model types that are taken over, and whether they normalise queries and keys."""

NEUTRAL_SINK = -10.0
"""Of windows: takes less than 5e-5 from a row whose largest logit is 0, and can still be learnt."""

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the original does not have."""

    layout: str
    window: int
    block_size: int
    num_selected_blocks: int
    sparse_sink: float
    """Logit that closes the sparse branch at the start."""


def adopt(source: Path, folder: Path, choices: Choices, say: Say) -> None:
    """Make `folder`, which must not exist or be empty, of the model in `source`.

    Raises ConfigError for an architecture that cannot be taken over or a layout that does not fit
    it, CheckpointError for a source that is damaged or a folder that cannot be written.
    """
    described = settings.read_json(source)
    model = settings.model_config(_tree(described, choices))
    kinds = [plan.kind for plan in parse_layout(model.layout).layers]
    if len(kinds) != described["num_hidden_layers"]:
        raise ConfigError(
            f"--layout: {choices.layout} has {len(kinds)} layers, but the model in {source} has "
            f"{described['num_hidden_layers']}"
        )
    tensors = TensorFolder(source)
    rows = described["vocab_size"]
    weights = model_weights(model, rows)
    kept = {
        name: shape
        for weight in weights
        for name, shape in weight.shapes.items()
        if not name.endswith(_NEW)
    }
    check_names(tensors, kept, ignored=("rotary_emb.inv_freq",))
    sources = {}
    for weight in weights:
        kind = kinds[int(weight.name.split(".")[2])] if ".layers." in weight.name else None
        of_the_original = [name for name, _ in weight.parts if name in kept]
        dtype = torch.float32 if not of_the_original else tensors.dtype(of_the_original[0])
        read = functools.partial(_read, weight, kind, tensors, choices, dtype)
        sources[weight.name] = padded(weight.name, Source(weight.shape, dtype, read))
    length = described.get("max_position_embeddings") or 2
    write_start(source, folder, model, sources, length, say)


_NEW = ("sparse_gate.weight", "window_gate.weight", "sparse_sink", "window_sink")
"""Ends of names of weights that the original does not have."""


def _read(
    weight: Fused,
    kind: LayerKind | None,
    tensors: TensorFolder,
    choices: Choices,
    dtype: torch.dtype,
) -> Tensor:
    made = {"sparse_sink": choices.sparse_sink, "window_sink": NEUTRAL_SINK}
    parts = {}
    for name, shape in weight.shapes.items():
        last = name.rpartition(".")[2]
        if last in made:
            parts[name] = torch.full(shape, made[last])
        elif name.endswith(_NEW):
            parts[name] = torch.zeros(shape, dtype=dtype)
        else:
            parts[name] = tensors.read(name).to(dtype)
    whole = weight.join(parts)
    # Exact in every float format: it only moves the exponent.
    doubled = kind is LayerKind.SPARSE and weight.name.endswith("linear_proj.weight")
    return 2 * whole if doubled else whole


def _tree(described: dict[str, Any], choices: Choices) -> dict[str, Any]:
    """The original's settings under our names. Raises ConfigError for what we cannot compute."""
    kind = described.get("model_type")
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"a model of type {kind} cannot be adopted; allowed {', '.join(ARCHITECTURES)}"
            + (": those of qwen2 have biases, which ours lacks" if kind == "qwen2" else "")
        )
    missing = [name for name in _NEEDED if name not in described]
    if missing:
        raise ConfigError(f"{settings.CONFIG_JSON} lacks {', '.join(missing)}")
    _refuse(described)
    heads = described["num_attention_heads"]
    return {
        "layout": choices.layout,
        "hidden_size": described["hidden_size"],
        "ffn_hidden_size": described["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": described.get("num_key_value_heads") or heads,
        "head_dim": described.get("head_dim") or described["hidden_size"] // heads,
        "vocab_size": described["vocab_size"],
        "block_size": choices.block_size,
        "num_selected_blocks": choices.num_selected_blocks,
        "window": choices.window,
        **settings.from_rope_parameters(settings.merged_rope_parameters(described)),
        "tie_embeddings": bool(described.get("tie_word_embeddings", False)),
        "qk_norm": ARCHITECTURES[kind],
        "norm_epsilon": described["rms_norm_eps"],
        "init_std": described.get("initializer_range") or 0.02,
    }


_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
    "rms_norm_eps",
)


def _refuse(described: dict[str, Any]) -> None:
    """Raise ConfigError for a setting that our layers do not have."""
    problems = []
    if described.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {described['hidden_act']}; allowed silu")
    problems += [
        f"{name}; allowed are models without biases"
        for name in ("attention_bias", "mlp_bias")
        if described.get(name)
    ]
    windowed = described.get("sliding_window") and described.get("use_sliding_window", True)
    if windowed or set(described.get("layer_types") or ()) - {"full_attention"}:
        problems.append("layers with a sliding window; allowed are models of full attention")
    if described.get("quantization_config"):
        problems.append("quantised weights; allowed are float weights")
    if problems:
        raise ConfigError(f"this model cannot be adopted: {'; '.join(problems)}")
