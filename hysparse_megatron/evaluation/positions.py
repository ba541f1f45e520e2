"""Held-out loss by position: whether more context helps, and how far."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hysparse_megatron.evaluation.loss import HeldOutLoss


@dataclass(frozen=True)
class Bin(HeldOutLoss):
    """The loss at positions first .. last of a sequence, counted from 0."""

    first: int
    last: int


def loss_by_position(losses: Iterable[Tensor], num_bins: int) -> tuple[Bin, list[Bin]]:
    """Mean loss over all positions, and in bins of equal width.

    `losses`: per token, [B, S] each with the same S; NaN where a token does not count. Bins without
    tokens are left out. Raises ValueError without any token.
    """
    total: Tensor | None = None
    for batch in losses:
        counts = ~batch.isnan()
        sums = torch.stack([batch.nan_to_num().double().sum(0), counts.double().sum(0)]).cpu()
        total = sums if total is None else total + sums
    if total is None or not total[1].sum():
        raise ValueError("no token to take the loss of")
    length = total.shape[1]
    edges = sorted({round(number * length / num_bins) for number in range(num_bins + 1)})
    found = [
        _bin(total, first, end)
        for first, end in itertools.pairwise(edges)
        if total[1, first:end].sum()
    ]
    return _bin(total, 0, length), found


def _bin(total: Tensor, first: int, end: int) -> Bin:
    loss, tokens = total[:, first:end].sum(1).tolist()
    return Bin(int(tokens), loss / tokens, first, end - 1)
