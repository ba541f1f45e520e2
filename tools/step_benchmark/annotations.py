"""Names the parts of a model in the profiler's trace by the families of `trace`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import loads
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.hooks import RemovableHandle

from hysparse_megatron.runtime.annotations import FULL_ATTENTION
from hysparse_megatron.training.state import TrainingState

from .reference import has_transformer_engine
from .trace import BY_NAME, EXPERTS, Breakdown, break_down


def _family(module: torch.nn.Module) -> str | None:
    """Of a module of megatron-core; our own parts name themselves."""
    if isinstance(module, DotProductAttention):
        return FULL_ATTENTION
    if isinstance(module, MoELayer):
        return EXPERTS
    if isinstance(module, SharedExpertMLP | TEGroupedMLP | SequentialMLP):
        return BY_NAME
    if has_transformer_engine():
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return FULL_ATTENTION if isinstance(module, TEDotProductAttention) else None
    return None


@contextmanager
def annotated(state: TrainingState) -> Iterator[None]:
    """Within, the parts of the model that are megatron-core's show in traces too."""
    handles = []
    for chunk in state.chunks:
        for module in chunk.modules():
            family = _family(module)
            if family is not None:
                handles += _annotate(module, family)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _annotate(module: torch.nn.Module, family: str) -> list[RemovableHandle]:
    open_ones: list[record_function] = []

    def begin(*_: Any) -> None:
        open_ones.append(record_function(family))
        open_ones[-1].__enter__()

    def end(*_: Any) -> None:
        open_ones.pop().__exit__(None, None, None)

    return [
        module.register_forward_pre_hook(begin),
        module.register_forward_hook(end, always_call=True),
    ]


def profile_step(state: TrainingState, step: Callable[[], object]) -> Breakdown:
    """Run one step under the profiler and sort what it did."""
    activities = [ProfilerActivity.CPU]
    if state.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with annotated(state), profile(activities=activities) as found:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        return break_down(loads(path.read_text())["traceEvents"])
