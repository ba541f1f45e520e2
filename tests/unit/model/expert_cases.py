"""Experts of one rank with random weights, rows for them, and what they should give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from hysparse_megatron.config.schema import Config
from hysparse_megatron.model.layers import LOCAL, LayerModules
from hysparse_megatron.model.local_experts import LocalExperts
from hysparse_megatron.model.megatron_config import make_megatron_config
from tests.unit.model.tiny_models import randomize
from tests.unit.single_process import DEVICE

COUNTS = {
    "all busy": [3, 5, 1, 7],
    "some idle": [0, 9, 0, 2],
    "the last idle": [4, 0, 6, 0],
    "one row": [0, 0, 1, 0],
    "no rows": [0, 0, 0, 0],
}
"""Rows of each expert."""


class Case(NamedTuple):
    """What experts are given, and the gradient of what they give."""

    hidden: Tensor
    """[T, C]"""
    counts: Tensor
    """int64 [E]"""
    probs: Tensor
    """fp32 [T]"""
    direction: Tensor
    """[T, C]"""


class Results(NamedTuple):
    output: Tensor
    d_hidden: Tensor
    d_probs: Tensor
    d_first: list[Tensor]
    d_second: list[Tensor]


def built(
    config: Config,
    groups: ProcessGroupCollection,
    *,
    grouped: bool,
    kind: type[SequentialMLP] = LocalExperts,
) -> SequentialMLP:
    """All experts of a layer on one rank."""
    megatron = make_megatron_config(config)
    megatron.grouped_experts = grouped
    experts = kind(
        config.model.moe.num_experts, megatron, LayerModules.of(LOCAL).expert_linears, groups
    ).to(DEVICE)
    randomize(experts)
    return experts


def draw(counts: Sequence[int], channels: int, dtype: torch.dtype) -> Case:
    """Random rows for experts."""
    rows = sum(counts)

    def normal() -> Tensor:
        return torch.randn(rows, channels, device=DEVICE).to(dtype)

    probs = torch.rand(rows, device=DEVICE)
    return Case(normal(), torch.tensor(counts, device=DEVICE), probs, normal())


def weights(experts: SequentialMLP) -> tuple[list[Tensor], list[Tensor]]:
    """E of [2F, C] and E of [C, F]."""
    return (
        [expert.linear_fc1.weight for expert in experts.local_experts],
        [expert.linear_fc2.weight for expert in experts.local_experts],
    )


def results(experts: SequentialMLP, case: Case) -> Results:
    """What `experts` give; absent gradients are an error."""
    hidden, probs = (tensor.detach().requires_grad_() for tensor in (case.hidden, case.probs))
    output, bias = experts(hidden, case.counts, probs)
    assert bias is None
    return _with_gradients(output, hidden, probs, weights(experts), case.direction)


def exact(experts: SequentialMLP, case: Case) -> Results:
    """The same in fp64, row by row."""
    hidden, probs = (
        tensor.detach().double().requires_grad_() for tensor in (case.hidden, case.probs)
    )
    first, second = (
        [weight.detach().double().requires_grad_() for weight in of] for of in weights(experts)
    )
    of_row = [expert for expert, count in enumerate(case.counts.tolist()) for _ in range(count)]
    outputs = [torch.zeros(0, hidden.shape[1], dtype=torch.double, device=hidden.device)]
    for row, expert in enumerate(of_row):
        gate, up = (first[expert] @ hidden[row]).chunk(2)
        inner = torch.nn.functional.silu(gate) * up * probs[row]
        outputs.append((second[expert] @ inner)[None])
    # So that what no row reads has a gradient of zeros.
    nothing = sum(leaf.sum() * 0 for leaf in (hidden, probs, *first, *second))
    output = torch.cat(outputs) + nothing
    return _with_gradients(output, hidden, probs, (first, second), case.direction.double())


def _with_gradients(
    output: Tensor,
    hidden: Tensor,
    probs: Tensor,
    matrices: tuple[list[Tensor], list[Tensor]],
    direction: Tensor,
) -> Results:
    first, second = matrices
    found = torch.autograd.grad(output, [hidden, probs, *first, *second], direction)
    of_weights = list(found[2:])
    experts = len(first)
    return Results(output.detach(), *found[:2], of_weights[:experts], of_weights[experts:])


def relative_errors(got: Results, wanted: Results, case: Case) -> dict[str, float]:
    """By name; of weights that of all experts together. 0 where both are all zeros.

    The gradient of a probability is a dot product that may be about 0, of what the output would be
    without it and the output's gradient: it is measured by their norms.
    """

    def error(name: str) -> float:
        mine, theirs = (getattr(of, name) for of in (got, wanted))
        if isinstance(mine, list):
            mine, theirs = torch.stack(mine), torch.stack(theirs)
        assert mine.shape == theirs.shape
        off, size = (mine.double() - theirs).norm(), theirs.norm()
        if name == "d_probs":
            factors = wanted.output.norm(dim=1) / case.probs, case.direction.double().norm(dim=1)
            size = (factors[0] * factors[1]).norm()
        return float(off / size) if off else 0.0

    return {name: error(name) for name in Results._fields}
