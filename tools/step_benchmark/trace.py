"""Where the time of a step went: the profiler's trace, kernel by kernel, in families.

Parts of the model are annotated with the family they belong to. A kernel has the family of the
innermost annotation its launch stands in; the backward pass of an operation has the family of its
forward pass, which the trace names, also where the forward pass was a recompute. What stands in no
annotation is sorted by its name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hysparse_megatron.runtime.annotations import FULL_ATTENTION, LOSS, OPTIMIZER, SPARSE_ATTENTION

GEMM = "GEMM"
EXPERTS = "experts: router, permute"
ELEMENTWISE = "norm and elementwise"
OTHER = "other"
FAMILIES = (
    FULL_ATTENTION,
    SPARSE_ATTENTION,
    GEMM,
    EXPERTS,
    ELEMENTWISE,
    OPTIMIZER,
    LOSS,
    OTHER,
)

_BY_NAME = (
    (
        FULL_ATTENTION,
        re.compile(r"\boracle_kernel|group_scores_kernel|topk_kernel|sdpa|fmha|flash"),
    ),
    (SPARSE_ATTENTION, re.compile(r"^(forward|dq|dkv|union|map|count|compact|chunk)_kernel")),
    (
        EXPERTS,
        re.compile(r"permute|row_id_map|sort_chunks|radix|bitonic|masked_select|histc", re.I),
    ),
    (GEMM, re.compile(r"gemm|nvjet|cutlass|cublas|aten::(mm|bmm|addmm|baddbmm|linear|matmul)$")),
    (OTHER, re.compile(r"embedding|index|scatter|gather|nccl", re.I)),
    (
        ELEMENTWISE,
        re.compile(
            r"norm|elementwise|vectorized|reduce|silu|swiglu|softmax|rope|cat|mem|aten::", re.I
        ),
    ),
)
"""First match wins."""

BY_NAME = "sorted by name"
"""Inside an annotation, what stands in no family after all."""

_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH = ("cuda_runtime", "cuda_driver")
_OPERATOR = ("cpu_op", "user_annotation")


@dataclass
class _Open:
    """An operation on the host that has not ended yet."""

    end: float
    family: str | None
    name: str
    own: float
    """Its time without what it calls, in microseconds."""


@dataclass
class Breakdown:
    """Seconds by family, and seconds in which the device did anything at all."""

    families: dict[str, float] = field(default_factory=dict)
    busy_seconds: float = 0.0


def family_of(name: str) -> str:
    """The family of a kernel or operator that stands in no annotation."""
    for family, pattern in _BY_NAME:
        if pattern.search(name):
            return family
    return OTHER


def break_down(events: Sequence[dict[str, Any]]) -> Breakdown:
    """Families of all kernels in a Chrome trace; of all operators where nothing ran on a GPU."""
    launched, called, operators = _host(events)
    kernels = [event for event in events if event.get("cat") in _DEVICE]
    total: defaultdict[str, float] = defaultdict(float)
    if not kernels:
        for own_family, seconds in operators:
            total[own_family] += seconds
        return Breakdown(dict(total), sum(total.values()))
    for kernel in kernels:
        told = kernel.get("args", {})
        # By the call that launched it, or by the operator that the trace says it belongs to.
        family = launched.get(told.get("correlation")) or called.get(told.get("External id"))
        total[family or family_of(kernel["name"])] += kernel["dur"] * 1e-6
    spans = [(kernel["ts"], kernel["ts"] + kernel["dur"]) for kernel in kernels]
    return Breakdown(dict(total), _covered(spans) * 1e-6)


def _host(
    events: Sequence[dict[str, Any]],
) -> tuple[dict[Any, str | None], dict[Any, str | None], list[tuple[str, float]]]:
    """Families by the id of a launch and by that of an operator; own seconds of all operators."""
    forward_of = _forwards(events)
    stacks: dict[Any, list[_Open]] = {}
    family_at: dict[tuple[Any, float], str | None] = {}
    launched: dict[Any, str | None] = {}
    called: dict[Any, str | None] = {}
    ended: list[_Open] = []
    host = [e for e in events if e.get("ph") == "X" and e.get("cat") in (*_LAUNCH, *_OPERATOR)]
    # In the order of time over all threads: a forward pass is known before its backward pass.
    for event in sorted(host, key=lambda event: (event["ts"], -event["dur"])):
        stack = stacks.setdefault(event["tid"], [])
        while stack and stack[-1].end <= event["ts"]:
            ended.append(stack.pop())
        place = (event["tid"], event["ts"])
        family = stack[-1].family if stack else None
        if event["cat"] in _LAUNCH:
            launched[event.get("args", {}).get("correlation")] = family
            continue
        if event["name"] in FAMILIES:
            family = event["name"]
        elif event["name"] == BY_NAME:
            family = None
        elif place in forward_of:
            family = family_at.get(forward_of[place]) or family
        family_at[place] = family
        if "External id" in event.get("args", {}):
            called[event["args"]["External id"]] = family
        if stack:
            stack[-1].own -= event["dur"]
        stack.append(_Open(event["ts"] + event["dur"], family, event["name"], event["dur"]))
    for stack in stacks.values():
        ended += stack
    own = [(one.family or family_of(one.name), max(0.0, one.own) * 1e-6) for one in ended]
    return launched, called, own


def _forwards(events: Iterable[dict[str, Any]]) -> dict[tuple[Any, float], tuple[Any, float]]:
    """Thread and time of a forward operation, by those of its backward operation."""
    starts: dict[Any, tuple[Any, float]] = {}
    ends: dict[Any, tuple[Any, float]] = {}
    for event in events:
        if event.get("cat") == "fwdbwd":
            found = starts if event["ph"] == "s" else ends
            found[event["id"]] = (event["tid"], event["ts"])
    return {place: starts[flow] for flow, place in ends.items() if flow in starts}


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals: kernels on two streams may overlap."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
