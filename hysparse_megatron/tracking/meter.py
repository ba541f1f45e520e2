"""What a step's row says about speed and memory, and which ranks are slow."""

from __future__ import annotations

import resource
import socket
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.architecture.parameters import with_vocabulary
from hysparse_megatron.config.schema import Config
from hysparse_megatron.plan.flops import forward_flops, training_flops
from hysparse_megatron.runtime.clock import ForwardClock

NUM_NAMED = 3
"""Slow ranks named in a row."""


KNOWN_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bf16 peak, in 1e12 FLOPs a second, by a part of the GPU's name."""


@dataclass(frozen=True)
class Place:
    """Where a rank is: its machine and its pipeline stage, whose ranks all do the same work."""

    host: str
    stage: int


class Meter:
    """Measures every step; every `tracking.straggler_interval` steps all ranks tell their numbers.

    That is one all-gather of three numbers per rank. The first one comes after the first step, for
    the memory's sake: its time, in which kernels are compiled, is not compared.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        clock: ForwardClock,
        device: torch.device,
        *,
        stage: int,
        restarts: int,
        log: Callable[[str], None],
    ) -> None:
        """Collective. `stage` is this rank's place in the pipeline, `restarts` the starts before.

        `vocab_size` is the data's; `config.model.vocab_size` overrides it if set.
        """
        self._config, self._clock, self._device = config, clock, device
        self._log, self._restarts = log, restarts
        self._flops = model_flops_per_token(config, vocab_size)
        places: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(places, Place(socket.gethostname(), stage))
        self._places: list[Place] = places
        self._seconds = 0.0
        self._data_seconds = 0.0
        self._steps = 0
        self._peak_bytes: int | None = None

    def measure(
        self, step: int, tokens: int, step_seconds: float, data_seconds: float
    ) -> dict[str, Any]:
        """Fields for the row of a step of so many tokens; equal on all ranks but `restarts`.

        `data_seconds` of it this rank waited for its samples.

        Call it on every rank after every step. Collective in some of them.
        """
        own_seconds = self._clock.take()
        is_first = self._peak_bytes is None
        if not is_first:
            self._seconds += own_seconds
            self._data_seconds += data_seconds
            self._steps += 1
        fields: dict[str, Any] = {}
        if is_first or step % self._config.tracking.straggler_interval == 0:
            fields = self._compare(step)
        return {
            **self._speed(tokens, step_seconds),
            "peak_memory_bytes": self._peak_bytes,
            **fields,
        }

    def _speed(self, tokens: int, step_seconds: float) -> dict[str, Any]:
        rate = tokens / step_seconds / dist.get_world_size()
        tflops = rate * self._flops / 1e12
        peak = self._config.cluster.peak_tflops or known_peak_tflops(self._device)
        return {
            "tokens_per_second_per_gpu": rate,
            "tflops_per_gpu": tflops,
            "mfu": tflops / peak if peak and self._device.type == "cuda" else None,
            "restarts": self._restarts,
        }

    def _compare(self, step: int) -> dict[str, Any]:
        """Gather what every rank measured since the last time."""
        steps = self._steps
        means = [total / max(1, steps) for total in (self._seconds, self._data_seconds)]
        own = [*means, peak_memory_bytes(self._device)]
        told = torch.tensor([own], dtype=torch.float64, device=self._device)
        gathered = told.new_empty(dist.get_world_size(), len(own))
        dist.all_gather_into_tensor(gathered, told)
        seconds, data_seconds, memory = gathered.T.tolist()
        self._peak_bytes = int(max(memory))
        self._steps, self._seconds, self._data_seconds = 0, 0.0, 0.0
        if steps == 0:
            return {}
        slowest = slowest_ranks(seconds, self._places)
        factor = self._config.tracking.straggler_factor
        if slowest[0]["medians"] > factor:
            rank = slowest[0]
            self._log(
                f"WARNING: rank {rank['rank']} on {rank['host']} is slow: {rank['seconds']:.3g} s "
                f"of forward passes a step, {rank['medians']:.1f} times the median of its pipeline "
                f"stage (mean of steps {step - steps + 1}-{step})"
            )
        return {
            "forward_seconds_min": min(seconds),
            "forward_seconds_median": statistics.median(seconds),
            "forward_seconds_max": max(seconds),
            "slowest_ranks": slowest,
            "data_seconds_max": max(data_seconds),
        }


def slowest_ranks(seconds: Sequence[float], places: Sequence[Place]) -> list[dict[str, Any]]:
    """The slowest ranks and their machines, by how many medians of their stage they take.

    The lower median, so that of two ranks the slow one stands out.
    """
    by_stage: dict[int, list[float]] = {}
    for place, one in zip(places, seconds, strict=True):
        by_stage.setdefault(place.stage, []).append(one)
    medians = {stage: statistics.median_low(values) for stage, values in by_stage.items()}
    found: list[dict[str, Any]] = [
        {
            "rank": rank,
            "host": place.host,
            "seconds": one,
            "medians": one / max(medians[place.stage], 1e-9),
        }
        for rank, (place, one) in enumerate(zip(places, seconds, strict=True))
    ]
    return sorted(found, key=lambda entry: -entry["medians"])[:NUM_NAMED]


def model_flops_per_token(config: Config, vocab_size: int) -> float:
    """FLOPs per token of one training step, without those of recompute: what MFU counts.

    Attention is counted causally over whole sequences, also where document masks make it cheaper.
    """
    model = with_vocabulary(config.model, vocab_size)
    forward = forward_flops(model, parse_layout(model.layout).kinds, config.train.seq_length)
    return training_flops(forward)


def known_peak_tflops(device: torch.device) -> float | None:
    """Of a GPU whose name says it; None of others and of a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in KNOWN_TFLOPS.items() if part in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this rank has held: of its GPU by tensors, else resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
