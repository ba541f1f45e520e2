"""Prompts in, tokens out: prefill in chunks, then one token a step for all sequences together."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import psutil
import torch
import torch.distributed as dist
from hysparse_kernels import FP8
from torch import Tensor

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.errors import ConfigError, DataError
from hysparse_megatron.inference.forward import advance, logits_of
from hysparse_megatron.inference.kv_cache import KvCache
from hysparse_megatron.inference.load import LoadedModel
from hysparse_megatron.inference.sampling import Sampler, Sampling
from hysparse_megatron.inference.steps import EagerSteps, GraphedSteps, why_no_graph
from hysparse_megatron.runtime.agreement import on_every_rank

_LEAST_STEPS_OF_A_GRAPH = 16
"""New tokens; with fewer steps go kernel by kernel, as recording takes two of them."""


class CacheDtype(enum.Enum):
    """How full layers store keys and values; windows always have the model's precision."""

    model = "model"
    bf16 = "bf16"
    fp8 = "fp8"

    def resolve(self, model: torch.dtype) -> torch.dtype:
        """The storage type, for a model that computes in `model`."""
        return {CacheDtype.bf16: torch.bfloat16, CacheDtype.fp8: FP8}.get(self, model)


@dataclass(frozen=True)
class Settings:
    """How to generate."""

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    """Ids that end a sequence; they are part of its tokens."""
    holes: frozenset[int] = frozenset()
    """Ids without a token among those of the model, which are never chosen."""
    prefill_chunk: int = 4096
    """Tokens taken in at a time, of one prompt or of several that are padded to the longest: bounds
    the memory of long and of many prompts. As many as keep the kernels of training busy."""
    cache_dtype: CacheDtype = CacheDtype.model
    cuda_graph: bool = True
    """Record the decode step as a CUDA graph where that can be and pays."""


@dataclass
class Generated:
    """What came out, and what it took."""

    tokens: list[list[int]]
    """New tokens by prompt."""
    cache: KvCache
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    """Those of steps after the prefill, which gives every sequence its first one."""
    decode_seconds: float = 0.0
    launched: str = "kernel by kernel"
    """How the steps after the prefill were, and why not as a CUDA graph if that was asked for."""


OnToken = Callable[[int, int], bool]
"""Is told the number of a prompt and its next token; says whether the sequence ends with it. Must
answer alike on all ranks."""


def new_cache(
    loaded: LoadedModel,
    capacities: Sequence[int],
    cache_dtype: CacheDtype,
    *,
    kinds: Sequence[LayerKind] | None = None,
    device: torch.device | str | None = None,
) -> KvCache:
    """An empty cache of a model; `kinds` of other layers, or `device` "meta", to count bytes."""
    return KvCache(
        loaded.config.model,
        loaded.kinds if kinds is None else kinds,
        capacities,
        full_dtype=cache_dtype.resolve(loaded.dtype),
        window_dtype=loaded.dtype,
        device=loaded.device if device is None else device,
        tensor_parallel_size=loaded.groups.tp.size(),
    )


def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    on_token: OnToken = lambda number, token: False,
) -> Generated:
    """Continue `prompts` (at least one, of token ids, at least one each). Collective.

    A sequence ends with a stop token, when `on_token` says so, or after `max_new_tokens`.

    Raises:
        ConfigError: the cache does not fit into memory.
        DataError: a prompt holds an id that the model does not have.
    """
    if (largest := max(map(max, prompts))) >= loaded.vocab_size:
        raise DataError(
            f"a prompt holds token id {largest}, but the model has {loaded.vocab_size} ids"
        )
    # The last new token is never read, so that it needs no place.
    capacities = [len(prompt) + settings.max_new_tokens - 1 for prompt in prompts]
    on_every_rank(
        lambda: _require_memory(loaded, capacities, settings.cache_dtype), os_error=ConfigError
    )
    cache = new_cache(loaded, capacities, settings.cache_dtype)
    generated = Generated([[] for _ in prompts], cache)
    sampler = Sampler(settings.sampling, loaded.vocab_size, settings.holes)
    rows = list(range(len(prompts)))

    def choose(logits: Tensor, rows: list[int]) -> list[int]:
        """Record the next token of `rows`; those that go on."""
        chosen = sampler.choose(logits, rows)
        # One rank draws: others might round a probability differently.
        dist.broadcast(chosen, group=loaded.groups.tp, group_src=0)
        goes_on = []
        for row, token in zip(rows, chosen.tolist(), strict=True):
            generated.tokens[row].append(token)
            is_full = len(generated.tokens[row]) == settings.max_new_tokens
            if not (on_token(row, token) or token in settings.stop_tokens or is_full):
                goes_on.append(row)
        return goes_on

    started = time.perf_counter()
    logits = prefill(loaded, cache, prompts, settings.prefill_chunk)
    rows = choose(logits, rows)
    generated.prefill_tokens = sum(map(len, prompts))
    generated.prefill_seconds = time.perf_counter() - started

    started = time.perf_counter()
    steps: EagerSteps | GraphedSteps = EagerSteps(loaded, cache)
    if settings.cuda_graph and rows and settings.max_new_tokens >= _LEAST_STEPS_OF_A_GRAPH:
        reason = why_no_graph(loaded, cache)
        if reason is None:
            steps = GraphedSteps(loaded, cache)
        generated.launched = "a CUDA graph a step" if reason is None else f"no graph: {reason}"
    while rows:
        logits = steps.logits(rows, [generated.tokens[row][-1] for row in rows])
        generated.decode_tokens += len(rows)
        rows = choose(logits, rows)
    generated.decode_seconds = time.perf_counter() - started
    return generated


def prefill(
    loaded: LoadedModel, cache: KvCache, prompts: Sequence[Sequence[int]], chunk: int
) -> Tensor:
    """Take all of `prompts` in, one for each row of an empty cache, at most `chunk` tokens a step.

    Returns the logits [A, V] that follow each.
    """
    last: list[Tensor | None] = [None] * len(prompts)
    for rows in _taken_together([len(prompt) for prompt in prompts], chunk):
        for start in range(0, len(prompts[rows[-1]]), chunk):
            pieces = [prompts[row][start : start + chunk] for row in rows]
            hidden = advance(loaded.model, cache, rows, pieces)
        for i, (row, piece) in enumerate(zip(rows, pieces, strict=True)):
            last[row] = hidden[len(piece) - 1, i]
    final = torch.stack([of_row for of_row in last if of_row is not None])
    return logits_of(loaded.model, final.unsqueeze(0))[0]


def _taken_together(lengths: Sequence[int], chunk: int) -> Iterator[list[int]]:
    """Prompts by their numbers: as many as fit into one step of `chunk` tokens, each padded to the
    longest, which is the last one; one that does not fit is alone."""
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if rows and (len(rows) + 1) * lengths[row] > chunk:
            yield rows
            rows = []
        rows.append(row)
    yield rows


def _require_memory(
    loaded: LoadedModel, capacities: Sequence[int], cache_dtype: CacheDtype
) -> None:
    """Raises ConfigError unless the cache fits into what is free now."""
    needed = new_cache(loaded, capacities, cache_dtype, device="meta").num_bytes
    if loaded.device.type == "cuda":
        free = torch.cuda.mem_get_info(loaded.device)[0]
        free += torch.cuda.memory_reserved(loaded.device)
        free -= torch.cuda.memory_allocated(loaded.device)
    else:  # which all ranks of this machine take from
        free = psutil.virtual_memory().available // loaded.groups.tp.size()
    if needed > free:
        raise ConfigError(
            f"{len(capacities)} sequence(s) of up to {max(capacities):,} tokens need a cache of "
            f"{needed:,} bytes, but {free:,} are free: give a shorter prompt, fewer at once, fewer "
            "new tokens, or the cache dtype fp8"
        )
