"""The compiled cross-entropy; over several ranks see test_replicated_parameters.py."""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from hysparse_megatron.model.loss import CompiledCrossEntropy
from tests.unit.single_process import DEVICE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shift", [-1e3, 0.0, 1e3])
@pytest.mark.parametrize(("length", "batch", "ids"), [(1, 1, 1), (7, 3, 50), (5, 2, 257)])
def test_losses_and_gradients(
    length: int,
    batch: int,
    ids: int,
    shift: float,
    dtype: torch.dtype,
    groups: ProcessGroupCollection,
    seed: int,
) -> None:
    spread = torch.randn(length, batch, ids, device=DEVICE)
    logits = (3 * spread + shift).to(dtype).requires_grad_()
    labels = torch.randint(0, ids, (length, batch), device=DEVICE)
    exact = logits.detach().double().requires_grad_()
    losses = CompiledCrossEntropy.apply(logits, labels, groups.tp)
    assert losses.dtype is torch.float32
    expected = torch.nn.functional.cross_entropy(
        exact.permute(1, 2, 0), labels.t(), reduction="none"
    ).t()
    # Differences from the largest logit are exact or rounded once, as is a sum of `ids` numbers.
    largest = float((exact.detach().amax(-1, keepdim=True) - exact.detach()).max())
    bound = 2**-23 * (4 + largest + ids**0.5)
    assert ((losses.double() - expected).abs() <= bound).all()
    direction = torch.randn(length, batch, device=DEVICE)
    [found] = torch.autograd.grad(losses, logits, direction)
    [wanted] = torch.autograd.grad(expected, exact, direction.double())
    assert found.dtype is dtype
    unit = torch.finfo(dtype).eps
    # The logarithm of the sum is rounded at the height of the logits.
    height = 2**-23 * (float(exact.detach().abs().max()) + 4 + ids**0.5)
    limit = unit * wanted.abs() + 2 * height * direction.double().abs().unsqueeze(-1)
    assert ((found.double() - wanted).abs() <= limit).all()


def test_what_is_kept_is_the_logits(groups: ProcessGroupCollection, seed: int) -> None:
    """And a few numbers a token: no probabilities."""
    kept: list[torch.Tensor] = []
    logits = torch.randn(6, 2, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, 64, (6, 2), device=DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        CompiledCrossEntropy.apply(logits, labels, groups.tp)
    sizes = sorted(tensor.numel() * tensor.element_size() for tensor in kept)
    assert sizes == [12 * 4, 12 * 8, logits.numel() * 2]
    assert any(tensor.data_ptr() == logits.data_ptr() for tensor in kept)
