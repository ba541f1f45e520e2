"""Block scores of Eq. 3 and the exact top-k over them, in plain PyTorch.

Shapes: B batch, S queries of a row, Sk keys of a row, HKV KV groups, G heads per group, N blocks,
K selected, C queries of a chunk, L keys that this chunk may see.
"""

import torch
from torch import Tensor

from hysparse_kernels.call import SelectionRule
from hysparse_kernels.documents import blocks_in_documents


def block_topk(scores: Tensor, num_selected: int) -> Tensor:
    """The ``num_selected`` best blocks of every row, exact and repeatable.

    Args:
        scores: [..., N], any float dtype; -inf marks a block that may not be selected.
        num_selected: K, in blocks; may exceed N.

    Returns:
        int32 [..., K], ids in ascending order, -1 where a row has fewer than K blocks to offer
        (always last). The lowest id wins a tie.
    """
    num_blocks = scores.shape[-1]
    kept = min(num_selected, num_blocks)
    # torch.topk promises no order among equals; a stable sort keeps the lower id in front.
    ordered, ids = torch.sort(scores, dim=-1, descending=True, stable=True)
    ids = ids[..., :kept].masked_fill(ordered[..., :kept] == -torch.inf, num_blocks)
    ids = ids.sort(dim=-1).values
    selected = scores.new_full((*scores.shape[:-1], num_selected), -1, dtype=torch.int32)
    selected[..., :kept] = ids.masked_fill(ids == num_blocks, -1)
    return selected


def dense_block_maxima(logits: Tensor, block_size: int, num_blocks: int) -> Tensor:
    """Largest logit of every block: [..., L] -> [..., N], of keys that count from a block's start.

    Blocks without a key hold -inf.
    """
    maxima = logits.new_full((*logits.shape[:-1], num_blocks), -torch.inf)
    num_keys = logits.shape[-1]
    whole = num_keys // block_size
    if whole:
        of_whole = logits[..., : whole * block_size].unflatten(-1, (whole, block_size))
        maxima[..., :whole] = of_whole.amax(-1)
    if whole * block_size < num_keys:
        maxima[..., whole] = logits[..., whole * block_size :].amax(-1)
    return maxima


def group_scores(block_maxima: Tensor, lse: Tensor) -> Tensor:
    """Scores [B, HKV, C, N] of a group's blocks; maxima [B, HKV, G, C, N], lse [B, HKV, G, C].

    Eq. 3 scores a block by its largest softmax probability, exp(block maximum - lse), and a
    group by the max over its heads. exp is monotone, so the logarithm ranks alike and does
    not underflow, but lse differs between the heads and must stay in. (Line 16 of Algorithm 1
    prints (S - m) / l without the exp; between heads that is a different order.)
    """
    return (block_maxima - lse.unsqueeze(-1)).amax(2)


def select_blocks(rule: SelectionRule, scores: Tensor, own: Tensor) -> Tensor:
    """int32 [B, HKV, C, K] by ``rule`` from scores [B, HKV, C, N]; -inf marks what is not visible.

    ``own`` is the block of every query, broadcast to [B, HKV, C, 1]: none after it is selected.
    """
    return block_topk(offered_scores(rule, scores, own), rule.num_selected)


def offered_scores(rule: SelectionRule, scores: Tensor, own: Tensor) -> Tensor:
    """What ``select_blocks`` selects from: reduced, inf where forced, -inf where not visible."""
    if rule.reduce_scores is not None:
        scores = rule.reduce_scores(scores)
    blocks = torch.arange(scores.shape[-1], device=scores.device)
    forced = (blocks < rule.forced_first_blocks) | (blocks > own - rule.forced_recent_blocks)
    scores = scores.masked_fill(forced, torch.inf)
    # Last, so that neither a forced block nor a NaN ever selects what lies in the future.
    return scores.masked_fill(blocks > own, -torch.inf)


class BlockSelector:
    """Fills ``block_indices`` [B, HKV, S, K] chunk by chunk while the oracle attention runs."""

    def __init__(
        self,
        rule: SelectionRule,
        batch: int,
        groups: int,
        queries: int,
        device: torch.device,
        document_start: Tensor | None = None,
        query_start: int = 0,
    ) -> None:
        """For ``queries`` at the positions from ``query_start`` on. ``document_start`` int64
        [B, Sk]: where blocks count from; None is the row's start."""
        self.rule = rule
        self.one_document = document_start is None
        self.query_start = query_start
        length = query_start + queries
        self.block = blocks_in_documents(document_start, length, rule.block_size, device)
        self.num_blocks = -(-length // rule.block_size)
        self.block_indices = torch.empty(
            batch, groups, queries, rule.num_selected, dtype=torch.int32, device=device
        )

    def block_maxima(self, logits: Tensor) -> Tensor:
        """Largest logit of every block: [B, HKV, G, C, L] -> [B, HKV, G, C, N]; -inf if unseen.

        Hidden keys hold -inf, so that blocks of one number in several documents share a place.
        """
        if self.one_document:
            return dense_block_maxima(logits, self.rule.block_size, self.num_blocks)
        maxima = logits.new_full((*logits.shape[:-1], self.num_blocks), -torch.inf)
        block = self.block[:, None, None, None, : logits.shape[-1]].expand_as(logits)
        return maxima.scatter_reduce_(-1, block, logits, "amax")

    def select(self, start: int, stop: int, block_maxima: Tensor, lse: Tensor) -> None:
        """Select for queries [start, stop).

        ``block_maxima`` [B, HKV, G, C, N] holds -inf where no key of a block is visible, ``lse``
        is [B, HKV, G, C].
        """
        scores = group_scores(block_maxima, lse)
        positions = slice(self.query_start + start, self.query_start + stop)
        own = self.block[:, None, positions, None]
        self.block_indices[:, :, start:stop] = select_blocks(self.rule, scores, own)
