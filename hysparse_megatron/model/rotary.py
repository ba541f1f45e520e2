"""The rotary position embedding: its frequencies, scaled or not, and the rotation itself.

megatron-core's embedding holds what is computed here: its own computation cuts fractions of a
head's channels off to whole numbers, knows llama3 with fixed settings alone, and its YaRN rotates
all channels. Operations and their order are those of transformers, in the same precision: an angle
is position times frequency, and far into a text one other bit of a frequency shows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.jit import jit_fuser
from torch import Tensor

from hysparse_megatron.architecture.model import ModelConfig
from hysparse_megatron.architecture.rope import RopeScalingConfig, RopeType


def rotary_frequencies(model: ModelConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Radians per token of the channel pairs of a head, `dtype` [rotary_dim / 2], on the CPU."""
    width, scaling = model.rotary_dim, model.rope_scaling
    period = model.rotary_base ** (torch.arange(0, width, 2, dtype=dtype, device="cpu") / width)
    if scaling.type is RopeType.linear:
        return 1.0 / period / _factor(scaling)
    if scaling.type is RopeType.llama3:
        return _llama3(1.0 / period, scaling)
    if scaling.type is RopeType.yarn:
        kept = 1 - _yarn_ramp(model).to(dtype)
        return 1.0 / (_factor(scaling) * period) * (1 - kept) + 1.0 / period * kept
    return 1.0 / period


def _factor(scaling: RopeScalingConfig) -> float:
    assert scaling.factor is not None  # validation wants it
    return scaling.factor


def _llama3(frequency: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Llama 3.1: slow channels are divided by the factor, fast ones kept, those between blended."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original, factor = scaling.original_max_position_embeddings or 0, _factor(scaling)
    wavelength = 2 * math.pi / frequency
    share = (original / wavelength - low) / (high - low)
    blended = (1 - share) * frequency / factor + share * frequency
    slow, fast = wavelength > original / low, wavelength < original / high
    return torch.where(slow, frequency / factor, torch.where(fast, frequency, blended))


def _yarn_ramp(model: ModelConfig) -> Tensor:
    """YaRN (arXiv 2309.00071): how far each pair is divided, from 0 (fast) to 1 (slow); fp32."""
    width, scaling = model.rotary_dim, model.rope_scaling
    original = scaling.original_max_position_embeddings or 0

    def pair_that_turns(times: float) -> float:
        """Which pair turns so many times within the original length."""
        turns = math.log(original / (times * 2 * math.pi))
        return (width * turns) / (2 * math.log(model.rotary_base))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(width // 2, dtype=torch.float32, device="cpu")
    return ((pairs - first) / (last - first)).clamp(0, 1)


def cosines_and_sines(angles: Tensor, scale: float) -> Tensor:
    """Both of all angles, [2, ...], times `scale`: what all layers rotate with."""
    return torch.stack((angles.cos(), angles.sin())) * scale


class Rotation(torch.autograd.Function):
    """What megatron-core's `apply_rotary_pos_emb` computes, rounded once each way.

    As Transformer Engine rounds: megatron-core's own rounds cosines and sines before, and their
    products. Compiled it is one pass, for GPUs without Transformer Engine, where the plain
    operations read and write a query six times over.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cosine: Tensor, sine: Tensor, compiled: bool) -> Tensor:
        """[S, B, heads, D] by fp32 [S, 1 or B, 1, rotary dim], turned by the same angle in both
        halves of the rotated channels."""
        ctx.save_for_backward(cosine, sine)
        ctx.rotate = _in_one_pass if compiled else _rotated
        return ctx.rotate(tensor, cosine, sine)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Turned back by as much."""
        cosine, sine = ctx.saved_tensors
        return ctx.rotate(grad, cosine, -sine), None, None, None


def _rotated(tensor: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    width = cosine.shape[-1]
    first, second = tensor[..., :width].chunk(2, dim=-1)
    turned = tensor[..., :width] * cosine + torch.cat((-second, first), dim=-1) * sine
    return torch.cat((turned.to(tensor.dtype), tensor[..., width:]), dim=-1)


_in_one_pass = jit_fuser(_rotated)
