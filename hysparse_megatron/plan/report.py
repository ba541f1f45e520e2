"""An overview as text for a terminal, and as plain values for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.plan.balance import balance_by_document
from hysparse_megatron.plan.memory import GIB, RankMemory
from hysparse_megatron.plan.offload import HOST_BANDWIDTH_GB
from hysparse_megatron.plan.overview import Overview, PipelineRank


def as_values(overview: Overview) -> dict[str, Any]:
    """Everything in the overview as numbers, texts, lists and dictionaries. Units in the names."""
    config, groups = overview.config, overview.groups
    return {
        "name": config.name,
        "layout": config.model.layout,
        "parallel": {
            **dataclasses.asdict(config.parallel),
            "dp": groups.dp,
            "edp": groups.edp,
            "world_size": groups.world_size,
            "num_microbatches": groups.num_microbatches,
        },
        "cluster": {
            **dataclasses.asdict(config.cluster),
            "scheduler": config.cluster.scheduler.value,
        },
        "vocabulary": {"ids": config.model.vocab_size, "from": overview.vocabulary},
        "parameters": {
            "total": overview.parameters.total,
            "active": overview.parameters.active,
            "embedding": overview.parameters.embedding,
            "output": overview.parameters.output,
        },
        "flops_per_token": {
            "linear": overview.flops.linear,
            "output": overview.flops.output,
            **{f"{name.value}_attention": n for name, n in overview.flops.branches.items()},
            "forward": overview.flops.total,
            "training": overview.training_flops_per_token,
        },
        "stages": [_stage_values(overview, index) for index in range(len(overview.stages))],
        "ranks": [_rank_values(index, rank) for index, rank in enumerate(overview.ranks)],
        "peak_bytes": overview.peak_bytes,
        "checkpoint_bytes": overview.checkpoint_bytes,
        "fits": overview.fits,
        "context_balance": [
            {"document_tokens": length, "slowest_over_mean": ratio}
            for length, ratio in balance_by_document(config).items()
        ],
        "step": _step_values(overview),
        "kv_cache": [
            {
                "context_length": row.context_length,
                "bytes": row.ours,
                "full_bytes": row.all_full,
                "hybrid_swa_bytes": row.hybrid_window,
            }
            for row in overview.cache
        ],
    }


def _stage_values(overview: Overview, index: int) -> dict[str, Any]:
    stage = overview.stages[index]
    cut = stage.cut and {
        "oracle": stage.cut.oracle,
        "hidden_bytes": stage.cut.hidden_bytes,
        "shared_bytes": stage.cut.shared_bytes,
    }
    return {
        "stage": index,
        "pp_rank": index % overview.plan.pp,
        "chunk": index // overview.plan.pp,
        "first_layer": stage.layers.start,
        "num_layers": len(stage.layers),
        "kinds": stage.kinds,
        "forward_flops_per_microbatch": stage.forward_flops,
        "cut": cut,
    }


def _step_values(overview: Overview) -> dict[str, float | None]:
    """Times are None where the machine's speed is not known."""
    time, seconds, train = overview.time, overview.seconds, overview.config.train
    tokens = train.global_batch_size * train.seq_length / overview.groups.world_size
    return {
        "seconds": seconds,
        "pipeline_seconds": None if seconds is None else time.pipeline_seconds,
        "data_seconds": None if seconds is None else time.data_seconds,
        "bubble_share": time.bubble_share,
        "tokens_per_second_per_gpu": None if seconds is None else tokens / seconds,
    }


_NO_DEVICE_BYTES = ("micro_batches_in_flight", "host")


def _rank_values(index: int, rank: PipelineRank) -> dict[str, Any]:
    memory = dataclasses.asdict(rank.memory)
    return {
        "pp_rank": index,
        "parameters": rank.parameters.total,
        "expert_parameters": rank.parameters.experts,
        "memory_bytes": {
            **{name: size for name, size in memory.items() if name not in _NO_DEVICE_BYTES},
            "total": rank.memory.total,
        },
        "micro_batches_in_flight": rank.memory.micro_batches_in_flight,
        "sent_bytes": dataclasses.asdict(rank.traffic),
        "host": rank.memory.host and dataclasses.asdict(rank.memory.host),
    }


def as_text(overview: Overview) -> str:
    """The overview for a terminal."""
    parts = [
        _head(overview),
        _flops(overview),
        _stage_table(overview),
        _memory_table(overview),
        *_offload(overview),
        _traffic_table(overview),
        _step(overview),
        _cache_table(overview),
    ]
    return "\n\n".join(parts)


def _head(overview: Overview) -> str:
    config, groups, counted = overview.config, overview.groups, overview.parameters
    parallel, train = config.parallel, config.train
    layout = overview.plan.layout
    kinds = ", ".join(f"{layout.kinds.count(kind)} {kind.label}" for kind in LayerKind)
    experts = "" if config.model.moe.num_experts == 0 else f", ep {parallel.ep}"
    context = "" if parallel.cp == 1 else f", cp {parallel.cp}"
    instances = parallel.num_distributed_optimizer_instances
    optimizers = "" if instances == 1 else f" ({instances} instances of the optimizer)"
    ramp = ""
    if train.ramp is not None:
        ramp = (
            f" (at the end of a ramp from {train.ramp.start} by {train.ramp.increment} over "
            f"{train.ramp.samples:,} samples)"
        )
    return (
        f"{config.model.layout}: {layout.num_layers} layers, {kinds}\n"
        f"vocabulary: {config.model.vocab_size:,} token ids ({overview.vocabulary})\n"
        f"parameters: {counted.total:,} in total, {counted.active:,} active\n"
        f"{groups.world_size} ranks: tp {parallel.tp}, pp {parallel.pp}, "
        f"vpp {parallel.vpp or 1}{experts}{context}, dp {groups.dp}{optimizers}, "
        f"sequence parallel {'on' if parallel.sequence_parallel else 'off'}\n"
        f"{train.global_batch_size} sequences of {train.seq_length} tokens a step{ramp}, "
        f"{groups.num_microbatches} micro-batches of {train.micro_batch_size} on each rank, "
        f"{train.precision.value}, recompute {train.recompute_text}"
    )


def _flops(overview: Overview) -> str:
    flops = overview.flops
    named = {
        "linear layers": flops.linear,
        "output": flops.output,
        **{f"{branch.value} attention": value for branch, value in flops.branches.items()},
    }
    rows = [
        [name, f"{value / 1e9:.3f}", f"{value / flops.total:.1%}"]
        for name, value in named.items()
        if value
    ]
    rows.append(["forward", f"{flops.total / 1e9:.3f}", "100%"])
    rows.append(["training step", f"{overview.training_flops_per_token / 1e9:.3f}", ""])
    return _table(["GFLOPs per token", "", "share"], rows)


def _stage_table(overview: Overview) -> str:
    rows = []
    for index, stage in enumerate(overview.stages):
        cut = stage.cut
        crossing = "" if cut is None else _size(cut.total_bytes)
        inside = "" if cut is None or cut.oracle is None else f"in the block of layer {cut.oracle}"
        rows.append(
            [
                str(index),
                f"{index % overview.plan.pp}.{index // overview.plan.pp}",
                f"{stage.layers.start}-{stage.layers.stop - 1}",
                stage.kinds,
                f"{stage.forward_flops / 1e12:.3f}",
                crossing,
                inside,
            ]
        )
    header = ["stage", "rank.chunk", "layers", "kinds", "TFLOPs", "cut before it", ""]
    note = "TFLOPs: forward pass of one micro-batch on one rank; cuts: per micro-batch and rank"
    return f"{_table(header, rows)}\n{note}"


def _memory_table(overview: Overview) -> str:
    def line(name: str, of: Sequence[int]) -> list[str]:
        return [name, *(f"{size / GIB:.2f}" for size in of)]

    memories: list[RankMemory] = [rank.memory for rank in overview.ranks]
    kinds = list(dict.fromkeys(name for memory in memories for name in memory.activations))
    rows = [
        line("weights", [memory.weights for memory in memories]),
        line("gradients", [memory.gradients for memory in memories]),
        line("optimizer", [memory.optimizer for memory in memories]),
        *(line(name, [memory.activations.get(name, 0) for memory in memories]) for name in kinds),
        line("working set", [memory.working_set for memory in memories]),
        line("runtime", [memory.runtime for memory in memories]),
        line("total", [memory.total for memory in memories]),
        ["in flight", *(f"{memory.micro_batches_in_flight:g}" for memory in memories)],
    ]
    limit = overview.config.cluster.memory_gib
    verdict = "memory of the accelerators is not known: cluster.memory_gib is null"
    if limit is not None:
        fits = "fits" if overview.fits else "DOES NOT FIT"
        verdict = f"{fits}: {overview.peak_bytes / GIB:.1f} of {limit:g} GiB on the fullest rank"
    header = ["GiB at the peak", *(f"pp {index}" for index in range(len(memories)))]
    return f"{_table(header, rows)}\n{verdict}"


def _offload(overview: Overview) -> list[str]:
    """What waits on the host, and what copying it takes; nothing if nothing does."""
    copies = [rank.memory.host for rank in overview.ranks if rank.memory.host is not None]
    if not overview.config.train.offload_activations:
        return []
    if not copies:
        return ["no activation waits on the host: all are below train.offload_min_bytes"]
    most = max(copies, key=lambda copied: copied.host_bytes)
    machine = most.host_bytes * overview.config.cluster.gpus_per_node
    return [
        f"activations on the host: {most.host_bytes / GIB:.2f} GiB of the fullest rank, "
        f"{machine / GIB:.1f} GiB a machine of such ranks; up to twice as much is pinned, as that "
        "comes in powers of two. Not compared with the machines' memory, which is not known here\n"
        f"copied in a step: {_size(most.step_bytes)} out and as much back, "
        f"{most.step_seconds:.3g} s each way at {HOST_BANDWIDTH_GB:g} GB/s, beside computing"
    ]


def _traffic_table(overview: Overview) -> str:
    rows = [
        [
            f"pp {index}",
            _size(rank.traffic.tensor_bytes),
            _size(rank.traffic.expert_bytes),
            _size(rank.traffic.context_bytes),
            _size(rank.traffic.data_bytes),
        ]
        for index, rank in enumerate(overview.ranks)
    ]
    header = [
        "bytes sent by a rank",
        "tensor / micro-batch",
        "experts / micro-batch",
        "context / micro-batch",
        "data / step",
    ]
    return _table(header, rows)


def _step(overview: Overview) -> str:
    values = _step_values(overview)
    if overview.seconds is None:
        speed = "no time planned, cluster.peak_tflops is null: a CPU, or a GPU without a preset"
    else:
        per_gpu = values["tokens_per_second_per_gpu"]
        speed = f"about {overview.seconds:.3g} s at 40% of the peak, {per_gpu:,.0f} tokens/s/GPU"
    balance = balance_by_document(overview.config)
    slowest = ", ".join(f"{ratio:.2f} of {length:,} tokens" for length, ratio in balance.items())
    uneven = f"full layers of the slowest rank, in the mean's, with documents: {slowest}\n"
    return (
        f"a step: {speed}; ranks wait {values['bubble_share']:.1%} of the pipeline's time\n"
        f"{uneven if balance else ''}"
        f"a checkpoint: {_size(overview.checkpoint_bytes)} on disk"
    )


def _cache_table(overview: Overview) -> str:
    rows = [
        [
            f"{row.context_length:,}",
            _size(row.ours),
            _size(row.all_full),
            f"{row.all_full / row.ours:.2f}x",
            _size(row.hybrid_window),
            f"{row.hybrid_window / row.ours:.2f}x",
        ]
        for row in overview.cache
    ]
    header = ["KV cache, bf16", "this layout", "all full", "", "windows for sparse", ""]
    return _table(header, rows)


def _size(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
