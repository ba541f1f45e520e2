"""How far rounding may move attention and its gradients from the exact result, element by element.

An operation rounds its factors, products, partial sums and results: each an error of its own, at
most the number's magnitude times the unit roundoff of its type. The variances of all of them, to
first order, add up to that of an element (Higham, Accuracy and Stability of Numerical Algorithms,
ch. 2.8 and 3). They come from magnitudes of terms and not from the size of a result: the gradient
of the only key that a query sees is exactly zero, but the two numbers whose difference it is are
rounded like all others. Where nothing is seen there is nothing to round, and zero has to be zero.

Shapes: B batch, T query tokens, S keys, HQ query heads, HKV KV groups, G heads per group, D
query/key head dim, DV value head dim, N blocks, K selected.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LIMIT = 6.0
"""In deviations. An error of many parts exceeds it with a probability below 2 exp(-LIMIT^2 / 2),
that is 3e-8, even if every part were as large as it can be (Hoeffding); of parts spread evenly,
as those of random inputs are, 2 exp(-3 LIMIT^2 / 2) = 7e-24."""

FUNCTION = 16
"""Squared error, in units of the last place, of an exponential or sigmoid."""


SUM_OF_TWO = 1 + 2
"""Variance of a sum of two stored numbers over that of both: its own rounding is of at most twice
their storage's variance."""


class Unit(NamedTuple):
    """How types round, as relative errors."""

    stored: float
    """Of results, and of factors that a kernel rounds before a product."""
    summed: float
    """Of arithmetic; tensor cores cut digits off instead of rounding to the nearest number."""
    underflow: float
    """Of stored numbers near zero: absolute."""

    @classmethod
    def of(cls, dtype: torch.dtype) -> Unit:
        """What is computed with inputs of this type: in fp32, of fp64 inputs in fp64."""
        info = torch.finfo(dtype)
        wide = torch.finfo(torch.promote_types(dtype, torch.float32))
        smallest = max(info.tiny * info.eps / 2, torch.finfo(torch.float32).tiny)
        return cls(info.eps / 2, wide.eps, smallest)

    def store(self, number: Tensor, variance: Tensor) -> Tensor:
        """Variance of a number that is stored; what has no error before is an exact zero."""
        return variance + ((self.stored * number) ** 2 + self.underflow**2) * (variance > 0)


@dataclass
class Variances:
    """Of an attention's results; gradients and sink are None where there are none."""

    output: Tensor
    """[B, T, HQ, DV]"""
    lse: Tensor
    """[B, HQ, T]"""
    scores: Tensor
    """[B, HKV, T]: the largest of a block's log score."""
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    sink: Tensor | None = None

    @property
    def numbers(self) -> tuple[Tensor | None, ...]:
        """Of output and gradients."""
        return self.output, self.query, self.key, self.value, self.sink


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    *,
    dtype: torch.dtype,
    sink: Tensor | None = None,
    grad: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Variances:
    """Variances of what a kernel computes from query [B, T, HQ, D], key [B, S, HKV, D], value
    [B, S, HKV, DV], sink [HQ] and the output's gradient [B, T, HQ, DV], in `dtype`.

    `seen` bool, broadcast to [B, HKV, T, S], says which keys a query sees.
    """
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    batch, groups = key.shape[0], key.shape[2]
    seen = seen.expand(batch, groups, -1, -1)
    wide = [tensor.detach().double() for tensor in (query, key, value)]
    heads = wide[0].unflatten(2, (groups, -1))
    pulls = None if grad is None else grad.detach().double().unflatten(2, (groups, -1))
    sinks = None if sink is None else sink.detach().double().unflatten(0, (groups, -1))
    rows = []
    for b in range(batch):
        of_row = []
        for g in range(groups):
            found = _Group(
                heads[b, :, g], wide[1][b, :, g], wide[2][b, :, g], seen[b, g], scale,
                None if sinks is None else sinks[g], Unit.of(dtype),
            )  # fmt: skip
            of_row.append(
                found.forward() + (found.backward(pulls[b, :, g]) if grad is not None else [])
            )
        rows.append(of_row)

    def joined(which: int, dim: int) -> Tensor:
        return torch.stack([torch.cat([part[which] for part in row], dim) for row in rows])

    result = Variances(joined(0, 1), joined(1, 0), joined(2, 0))
    if grad is not None:
        result.query, result.key, result.value = joined(3, 1), joined(4, 1), joined(5, 1)
        result.sink = None if sink is None else joined(6, 0).sum(0)
    return result


def added(parts: Sequence[Variances]) -> Variances:
    """Of a sum of results, each stored before, rounded after every addition.

    A sum of the first i numbers rounds by no more than i times what storing them rounds by.
    """
    times = 1 + sum(range(2, len(parts) + 1))

    def total(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in parts if getattr(part, name) is not None]
        return times * torch.stack(found).sum(0) if found else None

    return Variances(**{field.name: total(field.name) for field in dataclasses.fields(Variances)})


class _Group:
    """One KV group of one batch row: query [T, G, D], key [S, D], value [S, DV], seen [T, S]."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seen: Tensor,
        scale: float,
        sink: Tensor | None,
        unit: Unit,
    ) -> None:
        self.query, self.key, self.value, self.sink = query, key, value, sink
        self.scale, self.unit = scale, unit
        self.seen = seen[:, None]
        self.count = self.seen.sum(-1, keepdim=True) + (sink is not None)
        terms = torch.einsum("tgd,sd->tgs", query.abs(), key.abs()) * scale
        logits = torch.einsum("tgd,sd->tgs", query, key) * scale
        lse = logits.masked_fill(~self.seen, -math.inf).logsumexp(-1, keepdim=True)
        if sink is not None:
            lse = torch.logaddexp(lse, sink[:, None])
        # A row that sees nothing has a sink's weight of zero in the kernels too.
        self.lse = lse.masked_fill(~self.seen.any(-1, keepdim=True), 0.0)
        # Hidden before the exponential: what is not seen may be too large for one.
        self.weights = (logits - self.lse).masked_fill(~self.seen, -math.inf).exp()
        self.output = torch.einsum("tgs,sd->tgd", self.weights, value)
        # Of an exponent: of its product, of the shift by lse, and of its exponential.
        sizes = query.shape[-1] * terms**2 + FUNCTION * (1 + logits**2 + self.lse**2)
        self.on_logits = unit.summed**2 * sizes * self.seen
        # What all keys of a row have in common.
        self.on_lse = (self.weights**2 * self.on_logits).sum(-1, keepdim=True)
        self.on_lse += unit.summed**2 * FUNCTION * (self.count + self.lse**2)
        self.on_weights = self.weights**2 * (self.on_logits + unit.stored**2)
        self.on_weights += unit.underflow**2 * self.seen

    def forward(self) -> list[Tensor]:
        """Output [T, G, DV], lse [G, T], scores [1, T]."""
        terms = torch.einsum("tgs,sd->tgd", self.weights, self.value.abs())
        found = torch.einsum("tgs,sd->tgd", self.on_weights, self.value**2)
        found += self.output**2 * self.on_lse + self.unit.summed**2 * self.count * terms**2
        scores = (self.on_logits + self.on_lse).amax((1, 2))
        lse = self.on_lse.squeeze(-1).transpose(0, 1)
        return [self.unit.store(self.output, found), lse, scores[None]]

    def backward(self, grad: Tensor) -> list[Tensor]:
        """Query [T, G, D], key [S, 1, D], value [S, 1, DV] and sink [G], of grad [T, G, DV]."""
        unit, weights, key, value = self.unit, self.weights, self.key, self.value
        summed = unit.summed**2
        dp = torch.einsum("tgd,sd->tgs", grad, value)
        terms = torch.einsum("tgd,sd->tgs", grad.abs(), value.abs())
        delta = (weights * dp).sum(-1, keepdim=True)
        on_delta = (self.on_weights * dp**2).sum(-1, keepdim=True) + delta**2 * self.on_lse
        on_delta += unit.stored**2 * (grad * self.output).square().sum(-1, keepdim=True)
        sizes = (weights * terms).sum(-1, keepdim=True)
        on_delta += summed * (value.shape[-1] + self.count) * sizes**2

        apart = dp - delta
        d_logits = weights * apart
        on_dp = summed * (value.shape[-1] * terms**2 + dp**2 + delta**2)
        on_d_logits = weights**2 * (apart**2 * (self.on_logits + unit.stored**2) + on_dp)
        # A weight that vanishes takes its product with it.
        on_d_logits += unit.underflow**2 * (1 + apart**2) * self.seen

        sizes = torch.einsum("tgs,sd->tgd", d_logits.abs(), key.abs())
        on_query = torch.einsum("tgs,sd->tgd", on_d_logits, key**2) + summed * self.count * sizes**2
        d_query = torch.einsum("tgs,sd->tgd", d_logits, key)
        on_query += d_query**2 * self.on_lse
        on_query += torch.einsum("tgs,sd->tgd", weights, key) ** 2 * on_delta

        on_d_logits = on_d_logits + d_logits**2 * self.on_lse + weights**2 * on_delta
        on_weights = self.on_weights + weights**2 * self.on_lse
        found = [
            unit.store(self.scale * d_query, self.scale**2 * on_query),
            self._of_keys(self.scale * d_logits, self.scale**2 * on_d_logits, self.query),
            self._of_keys(weights, on_weights, grad),
        ]
        if self.sink is not None:
            share = (self.sink[:, None] - self.lse).exp() * self.seen.any(-1, keepdim=True)
            on_share = self.on_lse + summed * FUNCTION * (1 + self.sink[:, None] ** 2 + self.lse**2)
            on_sink = share**2 * (delta**2 * on_share + on_delta)
            on_sink += (unit.underflow * delta) ** 2  # as of the weights
            sizes = (share * delta.abs()).sum((0, 2))
            found.append(on_sink.sum((0, 2)) + summed * len(grad) * sizes**2)
        return found

    def _of_keys(self, numbers: Tensor, variance: Tensor, rows: Tensor) -> Tensor:
        """Of the sum over tokens and heads of numbers [T, G, S] * rows [T, G, D]: [S, 1, D]."""
        unit, readers = self.unit, self.seen.sum((0, 1))[:, None] * rows.shape[1]
        parts = torch.einsum("tgs,tgd->gsd", numbers, rows)
        sizes = torch.einsum("tgs,tgd->sd", numbers.abs(), rows.abs())
        found = torch.einsum("tgs,tgd->sd", variance, rows**2)
        # cuDNN stores the part of every head and then adds them up.
        found += unit.summed**2 * readers * sizes**2 + (unit.stored * parts).square().sum(0)
        return unit.store(parts.sum(0), found)[:, None]


def assert_within(got: Tensor, exact: Tensor, variance: Tensor, what: str) -> None:
    """Assert that rounding explains every difference of `got` from the exact result."""
    assert bool(got.isfinite().all()), f"{what} is not finite"
    error = (got.detach().double() - exact.detach().double()).abs()
    allowed = LIMIT * variance.sqrt()
    excess = torch.where(error <= allowed, 0.0, error / allowed.clamp(min=1e-300))
    off = int((excess > 0).sum())
    if off:
        place = [int(i) for i in torch.unravel_index(excess.argmax(), excess.shape)]
        raise AssertionError(
            f"{what} is off by {float(error[*place]):.1e} at {place}, where rounding moves it "
            f"by at most {float(allowed[*place]):.1e}; {off} of {excess.numel()} numbers are off"
        )


def wrong_rows(got: Tensor, offered: Tensor, variance: Tensor) -> Tensor:
    """Rows of a selection that no rounding explains: bool, `got`'s shape without its last.

    Any choice is right whose scores are, rank by rank, within rounding those of the best.

    Args:
        got: int32 [..., K]: different ids in ascending order, -1 last.
        offered: exact log scores [..., N]; inf where forced, -inf where not visible.
        variance: of the scores of a row [...].
    """
    scores = offered.gather(-1, got.clamp(min=0).long())
    hidden = ((scores == -math.inf) & (got >= 0)).any(-1)
    found = scores.masked_fill(got < 0, -math.inf).sort(-1, descending=True).values
    missing = (*got.shape[:-1], max(0, got.shape[-1] - offered.shape[-1]))
    best = offered.sort(-1, descending=True).values[..., : got.shape[-1]]
    best = torch.cat([best, best.new_full(missing, -math.inf)], -1)
    # Two scores are compared: each is off by as much.
    near = (found - best).abs() <= 2 * LIMIT * variance.sqrt().unsqueeze(-1)
    order = got.masked_fill(got < 0, torch.iinfo(got.dtype).max)
    ascending = (order[..., 1:] > order[..., :-1]) | (got[..., 1:] < 0)
    return hidden | ~((found == best) | near).all(-1) | ~ascending.all(-1)


def block_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    seen: Tensor,
    block: Tensor,
    softmax_scale: float | None = None,
) -> Tensor:
    """Exact log scores [B, HKV, T, N] of every group's blocks (Eq. 3), -inf where not visible.

    `lse` [B, HQ, T]; `seen` as in `attention`; `block` int64, broadcast to [B, S]: of every key.
    """
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    batch, groups = key.shape[0], key.shape[2]
    heads = query.detach().double().unflatten(2, (groups, -1))
    logits = torch.einsum("btkgd,bskd->bkgts", heads, key.detach().double()) * scale
    logits -= lse.double().unflatten(1, (groups, -1))[..., None]
    logits = logits.masked_fill(~seen.expand(batch, groups, -1, -1)[:, :, None], -math.inf).amax(2)
    scores = logits.new_full((*logits.shape[:3], int(block.max()) + 1), -math.inf)
    place = block.expand(batch, -1)[:, None, None].expand_as(logits)
    return scores.scatter_reduce_(3, place, logits, "amax")
