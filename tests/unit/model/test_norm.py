"""Our RMSNorm."""

import pytest
import torch
from tiny_models import tiny_config, tiny_megatron_config

from hysparse_megatron.model.norm import CompiledRMSNorm, RMSNorm
from tests.unit.single_process import DEVICE


def plain(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def built(width: int, *overrides: str, eps: float = 1e-5, compiled: bool = False) -> RMSNorm:
    config = tiny_megatron_config(tiny_config(*overrides))
    return (CompiledRMSNorm if compiled else RMSNorm)(config, width, eps).to(DEVICE)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_values_and_gradients(seed: int, scale: float, compiled: bool) -> None:
    norm = built(24, eps=1e-4, compiled=compiled)
    assert torch.equal(norm.weight, torch.ones(24, device=DEVICE))
    torch.nn.init.normal_(norm.weight)
    x = (scale * torch.randn(3, 5, 24, device=DEVICE)).requires_grad_()
    direction = torch.randn(3, 5, 24, device=DEVICE)
    (norm(x) * direction).sum().backward()
    wanted_x = x.detach().double().requires_grad_()
    wanted_weight = norm.weight.detach().double().requires_grad_()
    (plain(wanted_x, wanted_weight, 1e-4) * direction.double()).sum().backward()
    torch.testing.assert_close(norm(x).double(), plain(x, norm.weight, 1e-4), rtol=1e-5, atol=1e-6)
    for got, wanted in ((x.grad, wanted_x.grad), (norm.weight.grad, wanted_weight.grad)):
        assert got is not None
        assert wanted is not None
        assert (got.double() - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_is_computed_in_fp32(seed: int, compiled: bool) -> None:
    norm = built(1000, "train.precision=bf16", compiled=compiled)
    assert norm.weight.dtype == torch.bfloat16
    x = torch.randn(64, 1000, device=DEVICE).bfloat16().requires_grad_()
    got = norm(x)
    assert got.dtype == torch.bfloat16
    wanted = plain(x, norm.weight, 1e-5)
    # One rounding at the end: at most half a unit in the last of 8 bits.
    assert ((got.double() - wanted).abs() <= wanted.abs() * 2**-8).all()
    direction = torch.randn(64, 1000, device=DEVICE).bfloat16()
    found = torch.autograd.grad(got, (x, norm.weight), direction)
    expected = torch.autograd.grad(wanted, (x, norm.weight), direction.double())
    for gradient, exact in zip(found, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient - exact).double().norm() <= exact.double().norm() * 2**-8


def test_weights_are_marked_for_sequence_parallelism() -> None:
    parallel = ("parallel.tp=2", "parallel.sequence_parallel=true")
    assert built(24, *parallel).weight.sequence_parallel is True
    assert built(24).weight.sequence_parallel is False
