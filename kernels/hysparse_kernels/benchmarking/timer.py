"""How long repeated calls take, and how much memory a call takes beside its results."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hysparse_kernels.benchmarking.timing import Timing

_FLUSH_BYTES = 256 * 2**20
"""Zeroed before every repetition, so that nothing of the last one is left in the L2 cache."""


def seconds_of_steps(
    step: Callable[[], object], most: int, budget_seconds: float, device: torch.device
) -> list[float]:
    """Seconds of up to `most` steps, by the clock of the host around finished work.

    At least two, then none that starts after `budget_seconds`.
    """
    seconds: list[float] = []
    while len(seconds) < most and (len(seconds) < 2 or sum(seconds) < budget_seconds):
        _synchronize(device)
        began = time.perf_counter()
        step()
        _synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds


@dataclass(frozen=True)
class Timer:
    """Times calls on one device: about `budget_ms` of repetitions, 3 to 100 of them."""

    device: torch.device
    budget_ms: float

    def describe(self) -> str:
        """One line that says how times were taken."""
        if self.device.type == "cuda":
            how = "CUDA events around every repetition, L2 flushed before each"
        else:
            how = "wall clock around every repetition"
        return f"{how}; median and quartiles of about {self.budget_ms:.0f} ms, 3 to 100 repetitions"

    def measure(self, call: Callable[[], object]) -> Timing:
        """Time `call` after a first run, which compiles, and a second, which is an estimate."""
        return self.measure_together([call])[0]

    def measure_together(self, calls: Sequence[Callable[[], object]]) -> list[Timing]:
        """Time several calls that are to be compared, in turns: a clock that drifts, as a hot GPU's
        does, drifts for all of them."""
        for call in calls:
            call()
        _synchronize(self.device)
        began = time.perf_counter()
        for call in calls:
            call()
        _synchronize(self.device)
        estimate_ms = (time.perf_counter() - began) * 1e3 / len(calls)
        repetitions = int(max(3, min(100, self.budget_ms / max(estimate_ms, 1e-3))))
        time_once = self._events if self.device.type == "cuda" else self._wall_clock
        turns = [[time_once(call) for call in calls] for _ in range(repetitions)]
        _synchronize(self.device)
        return [Timing.of([turn[i]() for turn in turns]) for i in range(len(calls))]

    def extra_bytes(self, call: Callable[[], Any]) -> int | None:
        """Peak memory of `call` beyond what was there before and what it returns; None on CPU."""
        if self.device.type != "cuda":
            return None
        _synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        results = call()
        _synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device)
        return max(0, peak - before - _storage_bytes(results))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _events(self, call: Callable[[], object]) -> Callable[[], float]:
        """Run `call`; what is returned gives its milliseconds once the device is done."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=self.device).zero_()
        start.record()
        call()
        stop.record()
        return lambda: start.elapsed_time(stop)

    @staticmethod
    def _wall_clock(call: Callable[[], object]) -> Callable[[], float]:
        began = time.perf_counter()
        call()
        took_ms = (time.perf_counter() - began) * 1e3
        return lambda: took_ms


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _storage_bytes(results: Any) -> int:
    """Bytes of all tensors in a result, every storage counted once."""
    tensors = [results] if isinstance(results, Tensor) else list(results)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if isinstance(tensor, Tensor)
    }
    return sum(storages.values())
