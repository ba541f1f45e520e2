"""Decode steps: one new token for each sequence of a batch, kernel by kernel or as one CUDA graph.

A step of a large model is thousands of kernels of a few microseconds, which take longer to launch
than to run unless the batch is large. A CUDA graph launches them all at once.

Shapes: R rows of the cache, V padded vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from hysparse_kernels import Chunk, TokenCache, resolve_cached_backend
from torch import Tensor

from hysparse_megatron.inference.forward import advance, forward, logits_of
from hysparse_megatron.inference.kv_cache import KvCache
from hysparse_megatron.inference.load import LoadedModel


def why_no_graph(loaded: LoadedModel, cache: KvCache) -> str | None:
    """Why decode steps cannot be recorded as a CUDA graph, or None if they can."""
    config = loaded.config.model
    if cache.device.type != "cuda":
        return "there is no CUDA device"
    if loaded.groups.tp.size() > 1:
        return "the model is split over ranks"
    if config.moe.num_experts:
        return "experts that run one after another wait for their counts of tokens on the host"
    chunk = Chunk.replayed(range(len(cache.capacities)), cache.capacities, cache.device)
    heads = (config.num_attention_heads, config.head_dim)
    query = torch.empty(1, 1, *heads, dtype=loaded.dtype, device=cache.device)
    backend = config.backend.value
    for layer in cache.layers:
        block_size = config.block_size if isinstance(layer, TokenCache) else None
        choice = resolve_cached_backend(backend, query, chunk, layer, block_size=block_size)
        if choice.name != "triton":
            return f"attention runs in {choice.reason}"
    return None


class EagerSteps:
    """Steps as they come, of the rows that are asked for."""

    def __init__(self, loaded: LoadedModel, cache: KvCache) -> None:
        self._loaded = loaded
        self._cache = cache

    def logits(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """fp32 logits [len(rows), V] after one more token of each row, which the cache takes in."""
        hidden = advance(self._loaded.model, self._cache, rows, [[token] for token in tokens])
        return logits_of(self._loaded.model, hidden)[0]


class GraphedSteps:
    """Steps of all rows of a cache, recorded once.

    A row that is not asked for takes part with its last token over and over, and cannot come back.
    """

    def __init__(self, loaded: LoadedModel, cache: KvCache) -> None:
        """Records a step of `cache`, none of whose rows may be empty or full.

        Raises ValueError where `why_no_graph` has a reason.
        """
        reason = why_no_graph(loaded, cache)
        if reason is not None:
            raise ValueError(f"decode steps cannot be recorded: {reason}")
        self._cache = cache
        rows = range(len(cache.capacities))
        self._given = [0] * len(rows)
        self._tokens = torch.zeros(len(rows), 1, dtype=torch.int64, device=cache.device)
        self._chunk = Chunk.replayed(rows, cache.capacities, cache.device)
        # A step that does not count: the first real one writes over what it stores. In a ring that
        # takes the place of a token which no later one can see.
        self._send(cache.lengths)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and lets libraries take their memory
            self._compute(loaded)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._compute(loaded)

    def logits(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """See `EagerSteps.logits`. Raises ValueError where a row has no room."""
        taken = self._cache.chunk(rows, [1] * len(rows))
        past = [length - 1 for length in self._cache.lengths]
        for row, token in zip(rows, tokens, strict=True):
            self._given[row], past[row] = token, self._cache.lengths[row]
        self._send(past)
        self._graph.replay()
        self._cache.advance(taken)
        return self._logits[list(rows)]

    def _compute(self, loaded: LoadedModel) -> Tensor:
        chunk = dataclasses.replace(self._chunk)  # one that has not computed its positions yet
        return logits_of(loaded.model, forward(loaded.model, self._cache, chunk, self._tokens))[0]

    def _send(self, past: Sequence[int]) -> None:
        """What the next replay reads: the tokens given, and how many each row has before."""
        numbers = torch.tensor([self._given, list(past)]).pin_memory()
        on_device = numbers.to(self._cache.device, non_blocking=True)
        assert self._chunk.numbers is not None
        self._tokens[:, 0].copy_(on_device[0])
        self._chunk.numbers[1].copy_(on_device[1])
