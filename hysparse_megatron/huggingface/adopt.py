"""From a Llama- or Qwen-like model with full attention to a HySparse model that trains on.

Full layers, feed-forward layers, norms and embeddings keep their weights to the bit. A sparse layer
keeps q, k, v and o, biases included, as its window branch. Its gates begin at zero, so that each is
one half, and o doubled makes the window branch whole: where the window covers the text, the layer
is what it was. The sparse branch reads keys and values of another layer, of which its weights know
nothing: its sink, a logit beside those of its tokens, leaves it a small share at the start.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.architecture.model import ModelConfig
from hysparse_megatron.checkpoint.assemble import Source
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.huggingface import settings
from hysparse_megatron.huggingface.importing import check_names, padded, untied, write_start
from hysparse_megatron.huggingface.original import ARCHITECTURES, read_original, rotary_settings
from hysparse_megatron.huggingface.reading import TensorFolder
from hysparse_megatron.huggingface.weights import PARTS, Fused, model_weights

NEUTRAL_SINK = -10.0
"""Of windows: takes less than 5e-5 from a row whose largest logit is 0, and can still be learnt."""

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the original does not have."""

    layout: str
    window: int
    block_size: int
    num_selected_blocks: int
    sparse_sink: float
    """Logit that closes the sparse branch at the start."""


def adopt(source: Path, folder: Path, choices: Choices, log: Log) -> None:
    """Make `folder`, which must not exist or be empty, of the model in `source`.

    Raises ConfigError for an architecture that cannot be taken over or a layout that does not fit
    it, CheckpointError for a source that is damaged or a folder that cannot be written.
    """
    original = read_original(source)
    model = settings.model_config(_tree(original, choices))
    kinds = parse_layout(model.layout).kinds
    if len(kinds) != original.num_hidden_layers:
        raise ConfigError(
            f"--layout: {choices.layout} has {len(kinds)} layers, but the model in {source} has "
            f"{original.num_hidden_layers}"
        )
    if getattr(original, "attention_dropout", 0):
        log(f"WARNING: attention_dropout {original.attention_dropout} is not taken over")
    tensors = TensorFolder(source)
    model = untied(model, tensors, log)
    weights = model_weights(model, original.vocab_size)
    new = _new_names(model, kinds)
    kept = {
        name: shape
        for weight in weights
        for name, shape in weight.shapes.items()
        if not name.endswith(new)
    }
    check_names(tensors, kept, ignored=("rotary_emb.inv_freq",))
    sources = {}
    for weight in weights:
        kind = kinds[int(weight.name.split(".")[2])] if ".layers." in weight.name else None
        of_the_original = [name for name, _ in weight.parts if name in kept]
        dtype = tensors.widest(of_the_original) if of_the_original else torch.float32
        read = functools.partial(_read, weight, kind, new, tensors, choices, dtype)
        sources[weight.name] = padded(weight.name, Source(weight.shape, dtype, read))
    write_start(source, folder, model, sources, original.max_position_embeddings, log)


def _new_names(model: ModelConfig, kinds: Iterable[LayerKind]) -> tuple[str, ...]:
    """Ends of names of weights that the original does not have."""
    layers = [model.attention(kind) for kind in set(kinds)]
    gates = [f".{PARTS[gate.name]}.{of}" for one in layers for gate in one.gates for of in _LINEAR]
    return (*gates, *(f".{sink}" for one in layers for sink in one.sinks))


_LINEAR = ("weight", "bias")


def _read(
    weight: Fused,
    kind: LayerKind | None,
    new: tuple[str, ...],
    tensors: TensorFolder,
    choices: Choices,
    dtype: torch.dtype,
) -> Tensor:
    parts = {}
    for name, shape in weight.shapes.items():
        if not name.endswith(new):
            parts[name] = tensors.read(name).to(dtype)
        elif name.endswith(".sparse_sink"):
            parts[name] = torch.full(shape, choices.sparse_sink)
        elif name.endswith(".window_sink"):
            parts[name] = torch.full(shape, NEUTRAL_SINK)
        elif name.endswith(("_gate.weight", "_gate.bias")):
            parts[name] = torch.zeros(shape, dtype=dtype)
        else:
            raise ConfigError(f"{name}: not known how it begins in an adopted model")
    whole = weight.join(parts)
    # Exact in every float format: it only moves the exponent.
    doubled = kind is not None and kind.reads_oracle and weight.name.endswith("linear_proj.weight")
    return 2 * whole if doubled else whole


def _tree(original: PretrainedConfig, choices: Choices) -> dict[str, Any]:
    """The original's settings under our names."""
    heads, head_dim = original.num_attention_heads, getattr(original, "head_dim", None)
    return {
        "layout": choices.layout,
        "hidden_size": original.hidden_size,
        "ffn_hidden_size": original.intermediate_size,
        "num_attention_heads": heads,
        "num_query_groups": original.num_key_value_heads,
        # Not every architecture has it, but all take one that is given.
        "head_dim": original.hidden_size // heads if head_dim is None else head_dim,
        "vocab_size": original.vocab_size,
        "block_size": choices.block_size,
        "num_selected_blocks": choices.num_selected_blocks,
        "window": choices.window,
        **rotary_settings(original),
        "tie_embeddings": original.tie_word_embeddings,
        "qkv_bias": ARCHITECTURES[original.model_type].qkv_bias,
        "qk_norm": ARCHITECTURES[original.model_type].qk_norm,
        "norm_epsilon": original.rms_norm_eps,
        "init_std": original.initializer_range or 0.02,
    }
