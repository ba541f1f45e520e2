"""Names the parts of a model in the profiler's trace by the families of `trace`."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from json import loads
from pathlib import Path
from typing import Any
from unittest import mock

from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch.profiler import ProfilerActivity, profile, record_function

from hysparse_megatron.model import attention, stack
from hysparse_megatron.training.state import TrainingState

from .reference import has_transformer_engine
from .trace import (
    EXPERTS,
    FULL_ATTENTION,
    LOSS,
    OPTIMIZER,
    SPARSE_ATTENTION,
    Breakdown,
    break_down,
)

_DISPATCH = (
    "dispatch_preprocess",
    "token_dispatch",
    "dispatch_postprocess",
    "combine_preprocess",
    "token_combine",
    "combine_postprocess",
)


def _places(state: TrainingState) -> Iterator[tuple[Any, str, str]]:
    """(owner, attribute, family) of every function to annotate."""
    yield attention, "oracle_attention", FULL_ATTENTION
    for name in ("block_sparse_attention", "sliding_window_attention", "gated_sum"):
        yield attention, name, SPARSE_ATTENTION
    yield stack, "prepare_selection", SPARSE_ATTENTION
    yield DotProductAttention, "forward", FULL_ATTENTION
    if has_transformer_engine():
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        yield TEDotProductAttention, "forward", FULL_ATTENTION
    yield TopKRouter, "forward", EXPERTS
    for name in _DISPATCH:
        yield MoEAlltoAllTokenDispatcher, name, EXPERTS
    yield LanguageModule, "compute_language_model_loss", LOSS
    for name in ("prepare_grads", "get_grad_norm", "step"):
        yield state.optimizer, name, OPTIMIZER


def _annotated(call: Callable[..., Any], family: str) -> Callable[..., Any]:
    @functools.wraps(call)
    def run(*arguments: Any, **options: Any) -> Any:
        with record_function(family):
            return call(*arguments, **options)

    return run


@contextmanager
def annotated(state: TrainingState) -> Iterator[None]:
    """Within, the parts of the model show in traces."""
    with ExitStack() as patches:
        for owner, attribute, family in _places(state):
            call = _annotated(getattr(owner, attribute), family)
            patches.enter_context(mock.patch.object(owner, attribute, call))
        yield


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
