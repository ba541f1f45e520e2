"""Random inputs of attention on a GPU, and how far one result is from another."""

import torch
from torch import Tensor

from tests.kernels.drawn_cases import Inputs

BLOCK = 64


def draw(batch: int, length: int, shape: tuple[int, ...]) -> Inputs:
    """bf16 tensors of `shape`: query heads, KV groups, head dim and value dim."""
    heads, groups, head_dim, value_dim = shape

    def normal(count: int, width: int) -> Tensor:
        return torch.randn(batch, length, count, width, device="cuda", dtype=torch.bfloat16)

    sizes = ((heads, head_dim), (groups, head_dim), (groups, value_dim))
    sink = torch.randn(heads, device="cuda")
    return Inputs(*(normal(*size) for size in sizes), sink, normal(heads, value_dim))


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))
