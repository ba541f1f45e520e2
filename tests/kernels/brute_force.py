"""Attention and selection written once more, token by token, straight from the equations.

Independent of hysparse_kernels on purpose: fp64, one softmax per query and head, Python lists of
visible tokens, gradients by autograd. P1 = HySparse, arXiv 2602.03560.

Shapes: B batch, S sequence, HQ query heads, HKV KV groups, D query/key head dim, DV value head
dim, K selected.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Callable[[int, int, int], list[int]],
    sink: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """[B, S, HQ, DV]; ``visible(b, group, t)`` lists the tokens that query t of a group sees."""
    query, key, value = query.double(), key.double(), value.double()
    batch, length, heads, head_dim = query.shape
    heads_per_group = heads // key.shape[2]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    sequences = []
    for b in range(batch):
        rows = []
        for t in range(length):
            for h in range(heads):
                g = h // heads_per_group
                tokens = visible(b, g, t)
                weights = torch.exp(key[b, tokens, g] @ query[b, t, h] * scale)
                denominator = weights.sum()
                if sink is not None:
                    denominator = denominator + torch.exp(sink[h].double())
                mixed = weights @ value[b, tokens, g]
                rows.append(mixed / denominator if denominator > 0 else mixed)
        sequences.append(torch.stack(rows).view(length, heads, -1))
    return torch.stack(sequences)


Starts = list[list[int]]
"""starts[b][t]: the first token of the document that token t of batch row b lies in."""


def document_starts(lengths: list[int], batch: int, length: int) -> Starts:
    """``lengths`` of the documents one after the other, through all batch rows."""
    flat = []
    for tokens in lengths:
        flat += [len(flat) % length] * tokens
    return [flat[b * length : (b + 1) * length] for b in range(batch)]


def one_document(batch: int, length: int) -> Starts:
    return [[0] * length] * batch


def causal(starts: Starts) -> Callable[[int, int, int], list[int]]:
    """Eq. 2."""
    return lambda b, _g, t: list(range(starts[b][t], t + 1))


def last_tokens(window: int, starts: Starts) -> Callable[[int, int, int], list[int]]:
    """Eq. 5."""
    return lambda b, _g, t: [j for j in range(starts[b][t], t + 1) if j > t - window]


def selected_tokens(
    block_indices: Tensor, block_size: int, starts: Starts
) -> Callable[[int, int, int], list[int]]:
    """Eq. 6."""
    ids = block_indices.tolist()

    def visible(b: int, g: int, t: int) -> list[int]:
        chosen = set(ids[b][g][t])
        begin = starts[b][t]
        return [j for j in range(begin, t + 1) if (j - begin) // block_size in chosen]

    return visible


def log_sum_exp(
    query: Tensor, key: Tensor, scale: float | None = None, starts: Starts | None = None
) -> Tensor:
    """[B, HQ, S] of causal attention."""
    logits = _causal_logits(query, key, scale, starts)
    return torch.log(torch.exp(logits).sum(-1))


def select(
    query: Tensor,
    key: Tensor,
    block_size: int,
    num_selected: int,
    scale: float | None = None,
    forced_first: int = 0,
    forced_recent: int = 0,
    printed_algorithm: bool = False,
    starts: Starts | None = None,
) -> Tensor:
    """Eq. 3, group max, top-k: int32 [B, HKV, S, K].

    ``printed_algorithm`` scores by (block maximum - m) / l as line 16 of Algorithm 1 prints it.
    """
    logits = _causal_logits(query, key, scale, starts)
    row_max = logits.amax(-1, keepdim=True)
    row_sum = torch.exp(logits - row_max).sum(-1, keepdim=True)
    if printed_algorithm:
        token_scores = (logits - row_max) / row_sum
    else:
        token_scores = torch.exp(logits - row_max) / row_sum
    batch, heads, length, _ = logits.shape
    groups = key.shape[2]
    starts = starts or one_document(batch, length)
    scores = token_scores.view(batch, groups, heads // groups, length, length).tolist()
    return torch.tensor(
        [
            [
                [
                    _select_row(
                        [head[t][starts[b][t] :] for head in scores[b][g]],
                        t - starts[b][t],
                        block_size,
                        num_selected,
                        forced_first,
                        forced_recent,
                    )
                    for t in range(length)
                ]
                for g in range(groups)
            ]
            for b in range(batch)
        ],
        dtype=torch.int32,
    )


def _select_row(
    heads: list[list[float]],
    t: int,
    block_size: int,
    num_selected: int,
    forced_first: int,
    forced_recent: int,
) -> list[int]:
    own = t // block_size
    ranked = []
    for block in range(own + 1):
        tokens = range(block * block_size, min((block + 1) * block_size, t + 1))
        score = max(head[j] for head in heads for j in tokens)
        if block < forced_first or own - block < forced_recent:
            score = math.inf
        ranked.append((-score, block))
    chosen = sorted(block for _, block in sorted(ranked)[:num_selected])
    return chosen + [-1] * (num_selected - len(chosen))


def _causal_logits(
    query: Tensor, key: Tensor, scale: float | None, starts: Starts | None
) -> Tensor:
    """[B, HQ, S, S], -inf above the diagonal and left of the query's document."""
    query, key = query.detach().double(), key.detach().double()
    length, heads, head_dim = query.shape[1:]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    key = key.repeat_interleave(heads // key.shape[2], dim=2)
    logits = torch.einsum("bthd,bjhd->bhtj", query, key) * scale
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    if starts is not None:
        begin = torch.tensor(starts)[:, None, :, None]
        logits = logits.masked_fill(torch.arange(length) < begin, -math.inf)
    return logits.masked_fill(future, -math.inf)
