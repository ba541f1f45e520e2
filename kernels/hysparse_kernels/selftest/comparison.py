"""How far a result is from the specification: for the self-test, the benchmarks and the tests.

Shapes: B batch, S sequence, HQ query heads, HKV KV groups, D query/key head dim, N blocks,
K selected.
"""

import torch
from torch import Tensor

from hysparse_kernels.call import OracleOutput

TIE = 1e-4
"""Two block scores (natural logarithms) that are closer than this may be ranked either way."""

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative error of an output or a gradient, by the dtype it was computed in."""


def relative_error(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact| in the Euclidean norm; infinite where ``got`` is not finite.

    An ``exact`` of less than half a unit per element counts as that much: the random problems this
    is used on have gradients of about that size, and a sum that cancels has no relative error.
    """
    got, exact = got.detach().double(), exact.detach().double()
    error = (got - exact).norm() / exact.norm().clamp(min=0.5 * exact.numel() ** 0.5)
    return float(error) if bool(got.isfinite().all()) else float("inf")


@torch.no_grad()
def wrong_selections(
    got: Tensor,
    exact: OracleOutput,
    query: Tensor,
    key: Tensor,
    *,
    block_size: int,
    query_start: int = 0,
) -> int:
    """Rows of a selection that differ from the exact one by more than a near-tie.

    Args:
        got: int32 [B, HKV, S, K].
        exact: the reference's result for the same query and key in fp64.
        query: [B, S, HQ, D]; key: [B, Sk, HKV, D]. All S x Sk logits are made: for short sequences.
        block_size: tokens per block.
        query_start: position of a row's first query.

    Returns:
        How many of the B * HKV * S rows are wrong: other scores than the exact row's, or a block
        named twice, or ids that do not ascend with -1 last.
    """
    assert exact.block_indices is not None
    _, length, heads, head_dim = query.shape
    num_keys, groups = key.shape[1:3]
    keys = key.double().repeat_interleave(heads // groups, 2)
    logits = torch.einsum("bshd,bthd->bhst", query.double(), keys) * head_dim**-0.5
    later = torch.ones(length, num_keys, device=query.device).triu(1 + query_start).bool()
    scores = (logits - exact.lse.double()[..., None]).masked_fill(later, -torch.inf)
    scores = torch.nn.functional.pad(scores, (0, -num_keys % block_size), value=-torch.inf)
    scores = scores.unflatten(3, (-1, block_size)).amax(4)
    scores = scores.unflatten(1, (groups, heads // groups)).amax(2)

    def ranked(indices: Tensor) -> Tensor:
        found = scores.gather(3, indices.clamp(min=0).long())
        return found.masked_fill(indices < 0, -torch.inf).sort(-1).values

    a, b = ranked(got), ranked(exact.block_indices)
    wrong = ~((a == b) | ((a - b).abs() < TIE)).all(-1)
    order = torch.where(got < 0, torch.iinfo(torch.int32).max, got)
    ascending = (order[..., 1:] > order[..., :-1]) | (got[..., 1:] < 0)
    return int((wrong | ~ascending.all(-1)).sum())
