"""Our RMSNorm."""

import pytest
import torch
from tiny_models import tiny_config, tiny_megatron_config

from hysparse_megatron.model.norm import RMSNorm


def plain(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_values_and_gradients(seed: int, scale: float) -> None:
    norm = RMSNorm(tiny_megatron_config(tiny_config()), 24, eps=1e-4)
    assert torch.equal(norm.weight, torch.ones(24))
    torch.nn.init.normal_(norm.weight)
    x = (scale * torch.randn(3, 5, 24)).requires_grad_()
    direction = torch.randn(3, 5, 24)
    (norm(x) * direction).sum().backward()
    wanted_x = x.detach().double().requires_grad_()
    wanted_weight = norm.weight.detach().double().requires_grad_()
    (plain(wanted_x, wanted_weight, 1e-4) * direction.double()).sum().backward()
    torch.testing.assert_close(norm(x).double(), plain(x, norm.weight, 1e-4), rtol=1e-5, atol=1e-6)
    for got, wanted in ((x.grad, wanted_x.grad), (norm.weight.grad, wanted_weight.grad)):
        assert got is not None
        assert wanted is not None
        assert (got.double() - wanted).norm() < 1e-5 * wanted.norm()


def test_bf16_is_computed_in_fp32(seed: int) -> None:
    config = tiny_megatron_config(tiny_config("train.precision=bf16"))
    norm = RMSNorm(config, 1000)
    assert norm.weight.dtype == torch.bfloat16
    x = torch.randn(64, 1000).bfloat16()
    got = norm(x)
    assert got.dtype == torch.bfloat16
    wanted = plain(x, norm.weight, 1e-5)
    # One rounding at the end: at most half a unit in the last of 8 bits.
    assert ((got.double() - wanted).abs() <= wanted.abs() * 2**-8).all()


def test_weights_are_marked_for_sequence_parallelism() -> None:
    parallel = ("parallel.tp=2", "parallel.sequence_parallel=true")
    marked = RMSNorm(tiny_megatron_config(tiny_config(*parallel)), 24)
    assert marked.weight.sequence_parallel is True
    assert RMSNorm(tiny_megatron_config(tiny_config()), 24).weight.sequence_parallel is False
