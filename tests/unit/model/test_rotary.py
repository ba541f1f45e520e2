"""Frequencies of the rotary embedding: exact numbers of channels, scaled as transformers does."""

import dataclasses
import functools
import math
import random

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.process_groups_config import ProcessGroupCollection
from tiny_models import SEQUENCE, tiny_config, tiny_megatron_config, tiny_model
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hysparse_megatron.architecture.model import ModelConfig
from hysparse_megatron.architecture.rope import RopeScalingConfig, RopeType
from hysparse_megatron.config.schema import Config
from hysparse_megatron.config.validate import validate
from hysparse_megatron.huggingface.settings import from_rope_parameters, rope_parameters
from hysparse_megatron.model.layers import LayerChoice, fusions
from hysparse_megatron.model.rotary import Rotation, cosines_and_sines, rotary_frequencies
from tests.unit.single_process import DEVICE


def fp32_error(base: float) -> float:
    """Relative: of base ** -x with x up to 1, base and x rounded, and three roundings more."""
    return (4 + math.log(base)) * 2**-24


@functools.cache
def tiny() -> Config:
    return tiny_config()


def accepted(scaling: dict[str, object] | None = None, **settings: object) -> ModelConfig:
    config = tiny()
    rope = from_rope_parameters(scaling or {})["rope_scaling"]
    rope = RopeScalingConfig(**rope | {"type": RopeType(rope["type"])})
    model = dataclasses.replace(config.model, rope_scaling=rope, **settings)
    assert not validate(dataclasses.replace(config, model=model), world_size=1)
    return model


@pytest.mark.parametrize("head_dim", [6, 20, 64, 80, 96, 112, 128, 192, 256])
def test_every_fraction_rotates_its_channels(head_dim: int, rng: random.Random) -> None:
    """All even numbers of channels, their share given in full and to nine digits."""
    base = rng.uniform(100, 1e6)
    for channels in range(2, head_dim + 1, 2):
        for fraction in {channels / head_dim, round(channels / head_dim, 9)}:
            model = accepted(head_dim=head_dim, rotary_base=base, rotary_fraction=fraction)
            found = rotary_frequencies(model).tolist()
            expected = [base ** (-2 * i / channels) for i in range(channels // 2)]
            assert found == pytest.approx(expected, rel=fp32_error(base)), (channels, fraction)
            # What transformers cuts off is this number too.
            assert int(head_dim * rope_parameters(model)["partial_rotary_factor"]) == channels


def test_the_model_rotates_as_many(groups: ProcessGroupCollection) -> None:
    config = tiny_config("model.head_dim=192", "model.rotary_fraction=0.333333333")
    angles = tiny_model(config, groups).rotary_pos_emb(SEQUENCE)
    assert angles.shape == (SEQUENCE, 1, 1, 64)
    expected = [(SEQUENCE - 1) * 10000.0 ** (-2 * i / 64) for i in range(32)]
    assert angles[-1].flatten().tolist() == pytest.approx(2 * expected, rel=fp32_error(1e4))


def drawn_parameters(draw: random.Random) -> dict[str, object]:
    """Of any type, those with a default sometimes left out."""
    kind = draw.choice(["linear", "llama3", "yarn"])
    drawn: dict[str, object] = {"rope_type": kind, "factor": draw.uniform(1, 40)}
    if kind == "linear":
        return drawn
    drawn["original_max_position_embeddings"] = draw.randint(16, 9000)
    if kind == "llama3":
        low = draw.uniform(0.5, 3)
        return drawn | {"low_freq_factor": low, "high_freq_factor": low + draw.uniform(0.5, 6)}
    slow = draw.uniform(0.5, 3)
    optional: dict[str, object] = {
        "beta_slow": slow,
        "beta_fast": 3 + draw.uniform(0, 40),
        "truncate": draw.random() < 0.5,
        "attention_factor": draw.uniform(0.5, 2),
    }
    if draw.random() < 0.5:
        optional |= {"mscale": draw.uniform(0, 2), "mscale_all_dim": draw.choice([0.0, 0.7, 1.3])}
    return drawn | {name: value for name, value in optional.items() if draw.random() < 0.6}


def test_scaled_as_transformers_does(rng: random.Random) -> None:
    """To the bit, of drawn settings; and back from them the same."""
    for _ in range(200):
        parameters = drawn_parameters(rng)
        head_dim, base = 2 * rng.randint(2, 80), rng.uniform(500, 1e6)
        channels = 2 * rng.randint(2, head_dim // 2)
        parameters |= {"rope_theta": base, "partial_rotary_factor": channels / head_dim}
        sizes = {"head_dim": head_dim, "rotary_base": base}
        model = accepted(parameters, rotary_fraction=channels / head_dim, **sizes)
        described = rope_parameters(model)
        config = LlamaConfig(head_dim=head_dim, rope_parameters=described)
        compute = ROPE_INIT_FUNCTIONS[str(parameters["rope_type"])]
        frequencies, scale = compute(config, torch.device("cpu"))
        assert torch.equal(rotary_frequencies(model), frequencies), parameters
        assert model.rope_scaling.attention_scale == pytest.approx(scale, rel=1e-12), parameters
        assert accepted(described, rotary_fraction=channels / head_dim, **sizes) == model


def test_llama3_in_plain_numbers() -> None:
    """Llama 3.1's settings, in fp64 and written once more."""
    llama = {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 8192}
    model = accepted(llama, head_dim=128, rotary_base=5e5)
    expected = []
    for i in range(64):
        frequency = 500000 ** (-i / 64)
        turns = 8192 * frequency / (2 * math.pi)
        kept = min(1.0, max(0.0, (turns - 1) / 3))
        expected.append(frequency * (kept + (1 - kept) / 8))
    found = rotary_frequencies(model, torch.float64).tolist()
    assert found == pytest.approx(expected, rel=1e-13)


def test_yarn_in_plain_numbers() -> None:
    """Qwen2.5's settings, in fp64 and written once more."""
    qwen = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    model = accepted(qwen, head_dim=128, rotary_base=1e6)

    def pair(turns: float) -> float:
        return 64 * math.log(32768 / (2 * math.pi * turns)) / math.log(1e6)

    first, last = math.floor(pair(32)), math.ceil(pair(1))
    expected = []
    for i in range(64):
        divided = min(1.0, max(0.0, (i - first) / (last - first)))
        expected.append(1e6 ** (-i / 64) * (1 - divided + divided / 4))
    found = rotary_frequencies(model, torch.float64).tolist()
    assert found == pytest.approx(expected, rel=1e-6)  # the ramp is fp32, as in transformers
    assert model.rope_scaling.attention_scale == pytest.approx(1 + 0.1 * math.log(4))


def test_the_fused_rotation_is_left_out_where_it_cannot_scale() -> None:
    engine = LayerChoice(True, "", on_cuda=True)
    linear, yarn = {"rope_type": "linear", "factor": 4}, {"rope_type": "yarn", "factor": 4}
    assert fusions(engine, accepted(linear))["apply_rope_fusion"]
    yarn["original_max_position_embeddings"] = 8
    assert not fusions(engine, accepted(yarn))["apply_rope_fusion"]
    yarn["attention_factor"] = 1.0
    assert fusions(engine, accepted(yarn))["apply_rope_fusion"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_the_rotation_is_megatron_cores(
    compiled: bool, dtype: torch.dtype, rng: random.Random
) -> None:
    """Of drawn shapes, some channels not rotated; rounded once, where that rounds each product."""
    config = tiny_megatron_config(tiny())
    for _ in range(10):
        length, batch, heads = rng.randint(1, 30), rng.randint(1, 3), rng.randint(1, 5)
        width = 2 * rng.randint(1, 20)
        rest, scale = rng.choice([0, 3]), rng.uniform(0.5, 2)
        of_rows = rng.choice([1, batch])
        angles = 30 * torch.randn(length, of_rows, 1, width // 2, device=DEVICE).double()
        angles = torch.cat((angles, angles), dim=-1)
        given = torch.randn(length, batch, heads, width + rest, device=DEVICE).to(dtype)
        given.requires_grad_()
        exact = given.detach().double().requires_grad_()
        group = torch.distributed.ProcessGroup  # asked for nothing
        expected = apply_rotary_pos_emb(exact, angles, config, mscale=scale, cp_group=group)
        found = Rotation.apply(given, *cosines_and_sines(angles, scale).float(), compiled)
        direction = torch.randn_like(found)
        found.backward(direction)
        expected.backward(direction.double())
        unit = max(torch.finfo(dtype).eps, 4 * 2**-24)
        for got, wanted in ((found, expected), (given.grad, exact.grad)):
            assert got.dtype is dtype
            # Either half of a pair is a sum of two products.
            bound = unit * wanted.abs() + 8 * 2**-24 * scale * exact.detach().abs().amax()
            bound = bound + 8 * 2**-24 * scale * direction.double().abs().amax()
            assert ((got.double() - wanted).abs() <= bound).all()
