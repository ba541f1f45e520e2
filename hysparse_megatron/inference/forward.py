"""The forward pass of generation: new tokens through the model, past ones from the cache.

Shapes: A sequences of a step, C tokens of the longest one, H channels, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hysparse_kernels import Chunk
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

from hysparse_megatron.inference.kv_cache import KvCache
from hysparse_megatron.model.attend_cached import CachedAttend


@torch.no_grad()
def advance(
    model: HybridModel, cache: KvCache, rows: Sequence[int], tokens: Sequence[Sequence[int]]
) -> Tensor:
    """Take `tokens[i]` in as the next tokens of row `rows[i]`: hidden states of all of them.

    Returns [C, A, H] after the last norm; column i holds as many as `tokens[i]` has, then padding.
    `model` is whole on this rank but for tensor and expert parallelism, and in evaluation mode.
    """
    chunk = cache.chunk(rows, [len(of_row) for of_row in tokens])
    padded = torch.zeros(len(rows), chunk.width, dtype=torch.int64)
    for line, of_row in zip(padded, tokens, strict=True):
        line[: len(of_row)] = torch.tensor(of_row)
    hidden = forward(model, cache, chunk, padded.to(cache.device))
    cache.advance(chunk)
    return hidden


@torch.no_grad()
def forward(model: HybridModel, cache: KvCache, chunk: Chunk, tokens: Tensor) -> Tensor:
    """`advance` with tokens [A, C] on the device, which the cache stores but does not count."""
    stack = model.decoder
    attend = CachedAttend(
        config=stack.config, groups=stack.groups, caches=cache.layers, chunk=chunk
    )
    hidden = model.embedding(tokens, chunk.positions)
    return stack(hidden, None, _rotary(model, chunk), attend=attend)


@torch.no_grad()
def logits_of(model: HybridModel, hidden: Tensor) -> Tensor:
    """fp32 logits [X, A, V] of hidden states [X, A, H], the same on all tensor-parallel ranks."""
    tied = model.share_embeddings_and_output_weights
    weight = model.shared_embedding_or_output_weight() if tied else None
    logits, _ = model.output_layer(hidden, weight=weight, runtime_gather_output=True)
    return logits.float()


def _rotary(model: HybridModel, chunk: Chunk) -> Tensor:
    """Angles [C, A, 1, rotated channels] at each token's own position, as megatron-core lays them
    out."""
    frequencies = model.rotary_pos_emb.inv_freq.to(chunk.device)  # there already, if loaded
    angles = chunk.positions.transpose(0, 1).unsqueeze(-1) * frequencies
    return torch.cat([angles, angles], dim=-1).unsqueeze(2)
