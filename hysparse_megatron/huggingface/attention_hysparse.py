"""The attention of HySparse (arXiv 2602.03560, Eq. 1-9) in plain PyTorch, for prefill and decode.

Licensed under Apache-2.0: see LICENSE.code beside it.

Stands alone: it is copied into every exported folder. Queries are worked on in chunks, of which the
backward pass computes the logits again, so nothing of size S x S is kept. Scores and softmax are
fp32 whatever the model's dtype.

Shapes: B batch, Q queries of this call, L keys, H query heads, G KV groups, R = H / G heads per
group, D query/key head dim, V value head dim, N blocks, K selected, C queries of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_VALUES = 2**25
"""Logits, or values gathered, of a chunk: 128 MiB in fp32."""


@dataclass(frozen=True)
class Places:
    """Where the queries of a call stand: after `past` tokens, which a cache holds.

    `start` int64 [B] is each row's first token that is no padding; None where no row has padding
    on its left. Blocks and positions count from there.
    """

    past: int
    queries: int
    start: Tensor | None = None

    @property
    def total(self) -> int:
        """Tokens so far, those of this call included."""
        return self.past + self.queries

    def first(self, device: torch.device) -> Tensor:
        """`start`, int64 [B or 1]."""
        return (
            torch.zeros(1, dtype=torch.int64, device=device) if self.start is None else self.start
        )

    def positions(self, device: torch.device) -> Tensor:
        """int64 [B or 1, Q]: tokens of its row before each query; 0 in padding."""
        tokens = torch.arange(self.past, self.total, device=device)
        return (tokens - self.first(device)[:, None]).clamp(min=0)


@dataclass(frozen=True)
class SelectionRule:
    """Which blocks an oracle picks for its sparse layers."""

    block_size: int
    num_selected: int
    forced_first: int
    forced_recent: int


def full_attention(
    query: Tensor, key: Tensor, value: Tensor, places: Places, rule: SelectionRule | None
) -> tuple[Tensor, Tensor | None]:
    """Causal attention (Eq. 2) and, with a `rule`, the blocks it picks (Eq. 3).

    query [B, H, Q, D], key [B, G, L, D], value [B, G, L, V] with L = `places.total`
    -> [B, H, Q, V] in the query's dtype, int64 [B, G, Q, K] of ascending ids, -1 for none.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, start: int) -> Any:
        seen = start + query.shape[2]
        tokens = torch.arange(seen, device=query.device)
        hidden = _outside(tokens, tokens[start:], places)
        logits = _logits(query, key[:, :, :seen]).masked_fill(hidden, _LOWEST)
        mixed = _mix(logits, value[:, :, :seen], None, query)
        return mixed, None if rule is None else _select(logits.detach(), start, places, rule)

    batch, heads = query.shape[:2]
    chunks = _in_chunks(attend, query, batch * heads * places.total, places.past, key, value)
    outputs, picks = zip(*chunks, strict=True)
    return torch.cat(outputs, dim=2), None if rule is None else torch.cat(picks, dim=2)


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, places: Places, window: int, sink: Tensor | None
) -> Tensor:
    """Attention to the last `window` tokens, the own one included (Eq. 5): [B, H, Q, V].

    key and value hold the last L tokens, at least min(total, window - 1 + Q); sink is [H] or None.
    """
    first = places.total - key.shape[2]

    def attend(query: Tensor, key: Tensor, value: Tensor, start: int) -> Any:
        stop = start + query.shape[2]
        low = max(first, start - window + 1)
        tokens = torch.arange(low, stop, device=query.device)
        queries = torch.arange(start, stop, device=query.device)
        hidden = _outside(tokens, queries, places) | (tokens <= queries[:, None] - window)
        inside = slice(low - first, stop - first)
        logits = _logits(query, key[:, :, inside]).masked_fill(hidden, _LOWEST)
        return (_mix(logits, value[:, :, inside], sink, query),)

    batch, heads = query.shape[:2]
    limit = max(window, 128)  # more queries at once would see more keys that most must not see
    per_query = batch * heads * min(places.total, window + limit)
    chunks = _in_chunks(attend, query, per_query, places.past, key, value, limit)
    return torch.cat([output for (output,) in chunks], dim=2)


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    picks: Tensor,
    places: Places,
    block_size: int,
    sink: Tensor | None,
) -> Tensor:
    """Attention to the tokens of the picked blocks (Eq. 6-7): [B, H, Q, V].

    key and value are the oracle's, of all tokens, and picks int64 [B, G, Q, K] its choice. Only the
    picked tokens are read.
    """
    batch, groups, length, _ = key.shape
    heads = query.shape[1]
    per_group = heads // groups
    offsets = torch.arange(block_size, device=query.device)
    rows = torch.arange(batch * groups, device=query.device).view(batch, groups, 1, 1) * length
    begin = places.first(query.device).view(-1, 1, 1, 1)

    def attend(query: Tensor, key: Tensor, value: Tensor, start: int) -> Any:
        count = query.shape[2]
        chosen = picks[:, :, start - places.past :][:, :, :count]
        tokens = (begin + chosen * block_size).unsqueeze(-1) + offsets
        tokens = tokens.flatten(3)  # [B, G, C, K * block_size]
        queries = torch.arange(start, start + count, device=query.device).unsqueeze(-1)
        none = (chosen < 0).repeat_interleave(block_size, dim=-1)
        hidden = none | (tokens > queries)
        places_in_memory = (rows + tokens.masked_fill(hidden, 0)).flatten()

        def gather(tensor: Tensor) -> Tensor:
            picked = tensor.flatten(0, 2).index_select(0, places_in_memory)
            return picked.view(batch * groups * count, -1, tensor.shape[-1])

        # Every query reads tokens of its own: a row of a batched product is one query of a group.
        own = query.unflatten(1, (groups, per_group)).transpose(2, 3).flatten(0, 2)
        logits = _product(own * own.shape[-1] ** -0.5, gather(key).transpose(-1, -2))
        logits = logits.unflatten(0, (batch, groups, count)).transpose(2, 3)
        logits = logits.masked_fill(hidden.unsqueeze(2), _LOWEST)  # [B, G, R, C, tokens]
        weights = _softmax(logits, sink).transpose(2, 3).flatten(0, 2)
        mixed = _product(weights, gather(value)).unflatten(0, (batch, groups, count))
        return (mixed.transpose(2, 3).flatten(1, 2).to(query.dtype),)

    width = picks.shape[-1] * block_size
    per_query = batch * width * (groups * (key.shape[-1] + value.shape[-1]) + heads)
    chunks = _in_chunks(attend, query, per_query, places.past, key, value)
    return torch.cat([output for (output,) in chunks], dim=2)


def gated_sum(first: Tensor, second: Tensor, first_gate: Tensor, second_gate: Tensor) -> Tensor:
    """sigmoid(first_gate) first + sigmoid(second_gate) second, in fp32 (Eq. 8-9)."""
    mixed = torch.sigmoid(first_gate.float()) * first + torch.sigmoid(second_gate.float()) * second
    return mixed.to(first.dtype)


_LOWEST = torch.finfo(torch.float32).min
"""Logit of what a query may not see. Finite, so that a query of padding, which sees nothing, has a
gradient that is finite too."""


def _in_chunks(
    attend: Callable[..., Any],
    query: Tensor,
    values_per_query: int,
    past: int,
    key: Tensor,
    value: Tensor,
    limit: int | None = None,
) -> list[Any]:
    """`attend(query of a chunk, key, value, index of the chunk's first token)` for all chunks."""
    size = max(1, MAX_VALUES // max(1, values_per_query))
    results, start = [], past
    with torch.autocast(query.device.type, enabled=False):
        for chunk in query.split(min(size, limit or size), dim=2):
            if torch.is_grad_enabled() and query.requires_grad:
                result = checkpoint(attend, chunk, key, value, start, use_reentrant=False)
            else:
                result = attend(chunk, key, value, start)
            results.append(result)
            start += chunk.shape[2]
    return results


def _outside(tokens: Tensor, queries: Tensor, places: Places) -> Tensor:
    """Keys after the query and keys of padding: bool, broadcasts to [B, G, R, C, L]."""
    hidden = tokens > queries[:, None]
    if places.start is None:
        return hidden
    return hidden | (tokens < places.first(tokens.device)[:, None])[:, None, None, None]


def _product(first: Tensor, second: Tensor) -> Tensor:
    """Matrix product in fp32."""
    return first.float() @ second.float()


def _logits(query: Tensor, key: Tensor) -> Tensor:
    """[B, G, R, C, L]."""
    groups, count = key.shape[1], query.shape[2]
    grouped = query.unflatten(1, (groups, -1)).flatten(2, 3)
    scaled = grouped.float() * query.shape[-1] ** -0.5
    return _product(scaled, key.transpose(-1, -2)).unflatten(2, (-1, count))


def _softmax(logits: Tensor, sink: Tensor | None) -> Tensor:
    """Over the last dimension; the sink of a head takes a share and gives nothing."""
    if sink is None:
        return logits.softmax(dim=-1)
    share = sink.float().view(1, logits.shape[1], -1, 1, 1).expand(*logits.shape[:-1], 1)
    return torch.cat([logits, share], dim=-1).softmax(dim=-1)[..., :-1]


def _mix(logits: Tensor, value: Tensor, sink: Tensor | None, like: Tensor) -> Tensor:
    """[B, H, C, V]."""
    weights = _softmax(logits, sink)
    mixed = _product(weights.flatten(2, 3), value).unflatten(2, weights.shape[2:4])
    return mixed.flatten(1, 2).to(like.dtype)


@torch.no_grad()
def _select(logits: Tensor, start: int, places: Places, rule: SelectionRule) -> Tensor:
    """The blocks picked for a chunk of queries from `start` on: int64 [B, G, C, K].

    A block scores its largest probability of any head of the group. The logarithm ranks alike. The
    lowest id wins a tie, and a block that begins after its query is never picked.
    """
    size = rule.block_size
    length = logits.shape[-1]
    blocks = torch.arange(-(-length // size), device=logits.device)
    if places.start is None:
        padded = torch.nn.functional.pad(logits, (0, -length % size), value=_LOWEST)
        best = padded.unflatten(-1, (-1, size)).amax(-1)
    else:
        tokens = torch.arange(length, device=logits.device)
        block = (tokens - places.first(logits.device)[:, None]).clamp(min=0) // size
        block = block[:, None, None, None].expand_as(logits)
        best = torch.full_like(logits[..., : len(blocks)], _LOWEST)
        best = best.scatter_reduce(-1, block, logits, "amax")
    scores = (best - logits.logsumexp(dim=-1, keepdim=True)).amax(2)

    own = places.positions(logits.device)[:, None, start - places.past :, None] // size
    own = own[:, :, : logits.shape[-2]]
    forced = (blocks < rule.forced_first) | (blocks > own - rule.forced_recent)
    scores = scores.masked_fill(forced, torch.inf).masked_fill(blocks > own, -torch.inf)
    # torch.topk promises no order among equals; a stable sort does.
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    kept = min(rule.num_selected, len(blocks))
    ids = ids[..., :kept].masked_fill(ordered[..., :kept] == -torch.inf, len(blocks))
    ids = ids.sort(dim=-1).values
    ids = ids.masked_fill(ids == len(blocks), -1)
    return torch.nn.functional.pad(ids, (0, rule.num_selected - kept), value=-1)
