"""A few speeds for the self-test, beside attention as torch has it. `benchmarks` has all of them.

Shapes: see `checks`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hysparse_kernels import dispatch

SEQUENCE, HEADS, GROUPS, HEAD_DIM = 16384, 64, 4, 128
BLOCK_SIZE, NUM_SELECTED, WINDOW = 64, 16, 128
_REPETITIONS = 10


@dataclass(frozen=True)
class Speed:
    """Median milliseconds of one operation; `failure` says why there are none."""

    operation: str
    forward_ms: float | None = None
    backward_ms: float | None = None
    failure: str = ""

    def line(self) -> str:
        """One line of the table."""
        if self.failure:
            return f"  {self.operation:32s} {self.failure}"
        times = f"forward {self.forward_ms:7.2f} ms  backward {self.backward_ms:7.2f} ms"
        return f"  {self.operation:32s} {times}"


def describe() -> str:
    """What is timed."""
    return (
        f"{SEQUENCE} tokens, heads {HEADS}/{GROUPS}, dims {HEAD_DIM}/{HEAD_DIM}, bf16,"
        f" {NUM_SELECTED} blocks of {BLOCK_SIZE} (the first and the most recent), window {WINDOW}"
    )


def measure() -> list[Speed]:
    """Time everything on the current CUDA device; about 2 GB of memory."""

    def normal(count: int) -> Tensor:
        size = (1, SEQUENCE, count, HEAD_DIM)
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    inputs = [normal(count).requires_grad_() for count in (HEADS, GROUPS, GROUPS)]
    sink = torch.zeros(HEADS, device="cuda")
    own = torch.arange(SEQUENCE, device="cuda")[:, None] // BLOCK_SIZE
    recent = own - torch.arange(NUM_SELECTED - 2, -1, -1, device="cuda")
    first = torch.zeros_like(own)
    indices = torch.cat([first, torch.where(recent > 0, recent, -1)], 1).to(torch.int32)
    indices = indices.expand(1, GROUPS, -1, -1).contiguous()
    query, key, value = inputs
    lists = dispatch.prepare_selection(indices, HEADS, block_size=BLOCK_SIZE)

    def sdpa() -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in inputs)
        result = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return result.transpose(1, 2)

    def oracle() -> Tensor:
        return dispatch.oracle_attention(
            query, key, value, block_size=BLOCK_SIZE, num_selected=NUM_SELECTED
        ).output

    operations: dict[str, Callable[[], Tensor]] = {
        "torch SDPA, causal": sdpa,
        "oracle, lse and indices": oracle,
        "block-sparse": lambda: dispatch.block_sparse_attention(
            query, key, value, indices, block_size=BLOCK_SIZE, sink=sink, lists=lists
        ),
        "window": lambda: dispatch.sliding_window_attention(
            query, key, value, window=WINDOW, sink=sink
        ),
    }
    return [_speed(name, operation, inputs) for name, operation in operations.items()]


def _speed(name: str, operation: Callable[[], Tensor], inputs: list[Tensor]) -> Speed:
    try:
        forward = _median_ms(operation)
        output = operation()
        grad = torch.randn_like(output)
        backward = _median_ms(lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True))
    except RuntimeError as error:
        return Speed(name, failure=f"failed: {str(error).splitlines()[0][:100]}")
    return Speed(name, forward, backward)


def _median_ms(call: Callable[[], object]) -> float:
    for _ in range(2):
        call()
    times = []
    for _ in range(_REPETITIONS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)
