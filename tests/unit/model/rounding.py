"""How far apart two computations of one model's logits may be, in the largest of them."""

from collections.abc import Callable

import torch
from torch import Tensor

USUAL = 1e-5


def moved_by_rounding(
    model: torch.nn.Module, logits: Callable[[], Tensor], expected: Tensor
) -> float:
    """By how much some logit moves where each weight does by its rounding.

    `expected` is what `logits()` gives with the weights as they are.
    """
    former = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            steps = torch.randint(-1, 2, parameter.shape)
            parameter.mul_(1 + steps * torch.finfo(parameter.dtype).eps)
        moved = apart(logits(), expected)
        for parameter, kept in zip(model.parameters(), former, strict=True):
            parameter.copy_(kept)
    return moved


def allowed(moved: float) -> float:
    """1e-5, or what rounding makes of a few.

    Layers amplify it: of some thousand drawn models one was off by 3e-5. Additions in another order
    count as roundings of weights do, of which there are some per layer.
    """
    return max(USUAL, 16 * moved)


def apart(found: Tensor, expected: Tensor) -> float:
    """How far the logits that are farthest apart are, in the largest."""
    return float((found - expected).abs().max() / expected.abs().max())
