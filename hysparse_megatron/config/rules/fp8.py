"""Rules of FP8 matrix products."""

import contextlib
from collections.abc import Iterator

from hysparse_megatron.architecture.layout import LayoutError, parse_layout
from hysparse_megatron.architecture.model import Fp8, Layers
from hysparse_megatron.config.rules.multiples import is_multiple
from hysparse_megatron.config.schema import Config, Precision, Recompute, RecomputeModule
from hysparse_megatron.errors import Problem

FP8_UNIT = 16
"""Rows and columns of an FP8 matrix come in multiples of this."""


def fp8(config: Config) -> Iterator[Problem]:
    """What FP8 matrix products take; whether the GPU can do them is found out there."""
    model, train, parallel = config.model, config.train, config.parallel
    if model.fp8 is Fp8.none:
        return
    fp8 = f"model.fp8={model.fp8.value}"
    if model.layers is Layers.local:
        yield Problem("model.layers", "local", f"te or auto with {fp8}")
    if train.precision is not Precision.bf16:
        yield Problem("train.precision", train.precision.value, f"bf16 with {fp8}")
    if train.recompute is Recompute.full:
        yield Problem("train.recompute", "full", f"none or selective with {fp8}")
    elif train.recompute is Recompute.selective:
        for module in set(train.recompute_modules) - {RecomputeModule.attention}:
            yield Problem("train.recompute_modules", module.value, f"[attention] with {fp8}")
    tokens = train.seq_length * train.micro_batch_size
    if not is_multiple(tokens, FP8_UNIT * max(parallel.cp, 1)):
        got = f"{train.seq_length} (x train.micro_batch_size = {train.micro_batch_size}"
        got += f" / parallel.cp = {parallel.cp})" if parallel.cp > 1 else ")"
        yield Problem("train.seq_length", got, f"a multiple of {FP8_UNIT} tokens with {fp8}")
    for key, width in _columns(config):
        if not is_multiple(width, FP8_UNIT):
            yield Problem(key, f"{width} columns a rank", f"a multiple of {FP8_UNIT} with {fp8}")


def _columns(config: Config) -> Iterator[tuple[str, int]]:
    """What linear layers read and make on one rank, by the setting that it follows from."""
    model, tp = config.model, max(config.parallel.tp, 1)
    yield "model.hidden_size", model.hidden_size
    yield "model.ffn_hidden_size", model.ffn_hidden_size // tp
    if model.moe.num_experts > 0:
        yield "model.moe.expert_ffn_hidden_size", model.expert_width
        shared = model.moe.shared_expert_ffn_hidden_size // tp
        yield "model.moe.shared_expert_ffn_hidden_size", shared
    with contextlib.suppress(LayoutError):  # of which its own rule complains
        kinds = dict.fromkeys(parse_layout(model.layout).kinds)
        attentions = [model.attention(kind) for kind in kinds]
        # Queries, gates, keys and values of a layer are one projection.
        for width in dict.fromkeys(one.projection_rows // tp for one in attentions):
            yield "model.num_attention_heads", width
        yield "model.value_head_dim", attentions[0].output_width // tp
