"""What a generation took: speed, and the cache measured beside the planner's and a full model's."""

from __future__ import annotations

import torch
import torch.distributed as dist
from hysparse_kernels import FP8

from hysparse_megatron.architecture.kv_cache import all_full, kv_cache_bytes
from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.inference.generate import Generated, Settings, new_cache
from hysparse_megatron.inference.kv_cache import KvCache
from hysparse_megatron.inference.load import LoadedModel


def report(loaded: LoadedModel, generated: Generated, settings: Settings) -> str:
    """Lines of text, the same on all ranks. Collective over tensor ranks.

    Bytes are added up over the ranks. The cache of the same model with full layers alone is laid
    out in the same way, on a device that takes no memory.
    """
    cache = generated.cache
    kinds = all_full(loaded.kinds)
    full = new_cache(
        loaded, cache.capacities, settings.cache_dtype, kinds=kinds, device=torch.device("meta")
    )
    of_kind = _over_ranks(loaded, cache)
    measured, of_full = sum(of_kind.values()), sum(_over_ranks(loaded, full).values())
    storage = settings.cache_dtype.resolve(loaded.dtype)
    planned = sum(
        kv_cache_bytes(
            loaded.config.model, loaded.kinds, tokens, storage.itemsize, loaded.dtype.itemsize
        )
        for tokens in cache.capacities
    )
    kept = ", ".join(f"{kind.label} {size:,}" for kind, size in of_kind.items() if size)
    lines = [
        _speed("prefill", generated.prefill_tokens, generated.prefill_seconds),
        _speed("decode", generated.decode_tokens, generated.decode_seconds)
        + f" ({generated.launched})",
        f"cache for {sum(cache.capacities):,} tokens of {len(cache.capacities)} sequence(s): "
        f"{measured:,} bytes measured ({kept} layers)",
        f"  planner: {planned:,} bytes{_exponents(storage)}",
        f"  all layers full: {of_full:,} bytes, {of_full / measured:.2f} times as much",
    ]
    return "\n".join(lines)


def _speed(name: str, tokens: int, seconds: float) -> str:
    rate = f"{tokens / seconds:,.1f}" if tokens else "-"
    return f"{name}: {tokens:,} tokens in {seconds:.2f} s, {rate} tokens/s"


def _exponents(storage: torch.dtype) -> str:
    return ", without FP8's exponents (one byte a head and token)" if storage == FP8 else ""


def _over_ranks(loaded: LoadedModel, cache: KvCache) -> dict[LayerKind, int]:
    found = cache.bytes_by_kind()
    total = torch.tensor(list(found.values()), device=loaded.device)
    dist.all_reduce(total, group=loaded.groups.tp)
    return dict(zip(found, total.tolist(), strict=True))
