"""The selected branch of NSA in fla-core (flash-linear-attention), if it is installed.

Only the branch that reads selected blocks is called, neither compression nor window. Its layout of
indices is [B, S, HKV, K], -1 padding allowed.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hysparse_kernels.benchmarking.problem import Problem
from torch import Tensor

_MODULE = "fla.ops.nsa.parallel"
_KERNELS = ("parallel_nsa_fwd_kernel", "parallel_nsa_bwd_kernel_dq", "parallel_nsa_bwd_kernel_dkv")


def why_not(problem: Problem, device: torch.device) -> str | None:
    """Why it cannot do this problem, or None."""
    if device.type != "cuda":
        return "needs a CUDA device"
    heads = problem.heads_per_group
    if heads < 16 or heads & (heads - 1):
        return f"takes 16, 32, 64, ... query heads per group, not {heads}"
    try:
        _module()
    except Exception as error:  # whatever a package does that does not fit to this torch
        return f"{_MODULE} cannot be imported ({type(error).__name__}: {error})"
    return None


def make(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, problem: Problem
) -> Callable[[], Tensor]:
    """A call that returns the output [B, S, HQ, DV]."""
    by_token = indices.transpose(1, 2).contiguous()
    scale = problem.head_dim**-0.5
    function = _module().ParallelNSAFunction
    return lambda: function.apply(
        query, key, value, by_token, problem.num_selected, problem.block_size, scale, None
    )


def forget_tuning() -> None:
    """Let its autotuner measure again, so that each selection is timed with what suits it best."""
    for tuner in _tuners():
        tuner.cache.clear()
        tuner.cache_results = False  # on disk, where the next run would find this selection's


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """Only the first configuration of each kernel: enough to check results, and fast to compile."""
    with _configurations(lambda configs: configs[:1]):
        yield


@contextlib.contextmanager
def only_part(part: int, parts: int) -> Iterator[None]:
    """Every `parts`-th configuration, run once each: compiles a share of all and chooses none."""

    def once(call: Callable[[], object], **_options: object) -> list[float]:
        call()
        return [1.0, 1.0, 1.0]

    with _configurations(lambda configs: configs[part::parts]):
        forget_tuning()
        for tuner in _tuners():
            tuner.__dict__["do_bench"] = once
        try:
            yield
        finally:
            forget_tuning()
            for tuner in _tuners():
                tuner.__dict__.pop("do_bench", None)


@contextlib.contextmanager
def _configurations(choose: Callable[[list[Any]], list[Any]]) -> Iterator[None]:
    tuners = _tuners()
    all_configs = [tuner.configs for tuner in tuners]
    for tuner, configs in zip(tuners, all_configs, strict=True):
        tuner.configs = choose(configs)
    try:
        yield
    finally:
        for tuner, configs in zip(tuners, all_configs, strict=True):
            tuner.configs = configs


def _module() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would like flash-attn, which this branch does not use
        return importlib.import_module(_MODULE)


def _tuners() -> list[Any]:
    """The autotuners somewhere inside the decorated kernels; none without the package."""
    try:
        module = _module()
    except Exception:
        return []
    found = []
    for name in _KERNELS:
        kernel = getattr(module, name, None)
        while kernel is not None:
            if hasattr(kernel, "configs") and hasattr(kernel, "cache"):
                found.append(kernel)
            kernel = getattr(kernel, "fn", None)
    return found
