"""One case in a process of its own: `step_benchmark.child REQUEST RESULT`.

Clean memory and clean state of megatron-core, whatever ran before. The result is a JSON file; a
case that runs out of memory or is refused has a note in it instead of numbers.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hysparse_kernels import BackendUnavailable
from hysparse_kernels.benchmarking.timer import seconds_of_steps

from hysparse_megatron.config.frozen import from_yaml
from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import HySparseError
from hysparse_megatron.runtime.launcher import rank_from_environment
from hysparse_megatron.runtime.quiet import quiet_libraries

from .request import Request

_MOST_BATCHES = 8
"""Different batches made in advance; more steps take them in turns."""


def main(argv: Sequence[str]) -> int:
    """Measure the request in the first file and write the second."""
    asked, answered = map(Path, argv)
    result = answer(Request(**json.loads(asked.read_text())))
    failed = "note" in result
    # Rank 0 tells what was measured, and whoever fails why nothing was: the first has the cause.
    if rank_from_environment().rank == 0 or failed:
        with contextlib.suppress(FileExistsError), answered.open("x") as file:
            json.dump(result, file)
    return int(failed)


def answer(request: Request) -> dict[str, Any]:
    """What was measured, or {"note": why nothing was}."""
    quiet_libraries()
    try:
        return measure(request)
    except torch.OutOfMemoryError as error:
        return {"note": f"out of memory: {_first_line(error)}"}
    except (HySparseError, BackendUnavailable) as error:
        return {"note": f"refused: {_first_line(error)}"}
    except Exception as error:
        traceback.print_exc()
        return {"note": f"failed: {type(error).__name__}: {_first_line(error)}"}


def measure(request: Request) -> dict[str, Any]:
    """Build, warm up, time, and look at one more step with the profiler."""
    from hysparse_megatron.model.builder import build_chunks
    from hysparse_megatron.runtime import device as runtime_device
    from hysparse_megatron.training.startup_log import attention_backend
    from hysparse_megatron.training.state import build_state
    from hysparse_megatron.training.step import train_step

    from . import annotations, attending, reference

    config = from_yaml(request.config)
    rank = rank_from_environment()
    device = runtime_device.start(rank, config.parallel)
    backend = attention_backend(config, device)
    facts = {"attention": reference.describe() if request.reference else f"{backend.name} backend"}
    began = time.perf_counter()
    assert config.model.vocab_size is not None
    build = reference.build_reference_chunks if request.reference else build_chunks
    state = build_state(config, config.model.vocab_size, device, build)
    build_seconds = time.perf_counter() - began
    number = 1 if request.same_batch else min(request.warmup + request.steps, _MOST_BATCHES)
    replica, replicas = state.groups.dp.rank(), state.groups.dp.size()
    seeds = range(replica * number, (replica + 1) * number)
    batches = itertools.cycle([random_batch(config, seed, replicas) for seed in seeds])
    steps = itertools.count()
    losses: list[float] = []

    def step() -> None:
        losses.append(train_step(state, next(steps), next(batches)).loss)

    replaced = contextlib.ExitStack()
    replaced.enter_context(attending.replaced(state, request.picks, request.layerwise))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(request.warmup):
        step()
    # Ranks must take equally many steps, whatever their clocks say.
    budget = request.budget_seconds if rank.world_size == 1 else float("inf")
    seconds = seconds_of_steps(step, request.steps, budget, device)
    result: dict[str, Any] = {
        **facts,
        "build_seconds": build_seconds,
        "step_seconds": seconds,
        "losses": list(losses),  # without the profiled step's
        "memory": _memory(device),
        "num_parameters": state.num_parameters(),
    }
    if request.profile:
        try:
            result["profile"] = asdict(annotations.profile_step(state, step))
        except Exception as error:  # the profiler's memory or its trace; the times are good
            traceback.print_exc()
            result["profile_note"] = f"{type(error).__name__}: {_first_line(error)}"
    replaced.close()
    runtime_device.stop()
    return result


def random_batch(config: Config, seed: int, replicas: int = 1) -> list[dict[str, torch.Tensor]]:
    """One replica's micro-batches of a step, as `BatchSource` yields them, of random tokens."""
    train, vocab_size = config.train, config.model.vocab_size
    assert vocab_size is not None
    generator = torch.Generator().manual_seed(seed)
    shape = (train.micro_batch_size, train.seq_length + 1)
    microbatches = []
    for _ in range(train.global_batch_size // train.micro_batch_size // replicas):
        rows = torch.randint(vocab_size, shape, generator=generator)
        inputs, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        microbatches.append(
            {
                "tokens": inputs,
                "labels": labels,
                "loss_mask": torch.ones(inputs.shape, dtype=torch.float32),
                "position_ids": torch.arange(inputs.shape[1]).expand_as(inputs).contiguous(),
            }
        )
    return microbatches


def _memory(device: torch.device) -> dict[str, int] | None:
    """Bytes: at the peak of a step, as PyTorch and as the device see it, and between steps."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return {
        "state": torch.cuda.memory_allocated(device),
        "peak_allocated": torch.cuda.max_memory_allocated(device),
        "peak_reserved": torch.cuda.max_memory_reserved(device),
        "device_used": total - free,
    }


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    # Not sys.exit: after a failure a library's exit handler could wait for a device that is gone.
    os._exit(code)
