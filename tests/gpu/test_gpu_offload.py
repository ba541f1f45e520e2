"""Activations that wait in host memory on a GPU: the same gradients, less memory, and the time.

`pytest -s` shows what was measured.
"""

import gc
import time
from dataclasses import dataclass

import pytest
import torch
from hysparse_kernels import autograd
from torch import Tensor

from hysparse_megatron.config.compose import compose
from hysparse_megatron.plan.overview import make_overview
from hysparse_megatron.runtime.process_groups import destroy_process_groups
from hysparse_megatron.training.state import TrainingState, build_state
from tests.unit.single_process import DEVICE, default_group

pytestmark = pytest.mark.alone

LENGTH, BATCH, VOCABULARY = 8192, 2, 8192
SLICE = [
    *("model=hysparse_7b", "model.layout=2*(F 3*S)", f"model.vocab_size={VOCABULARY}"),
    *("model.layers=local", "train.precision=bf16", "cluster=h200"),
    *(f"train.seq_length={LENGTH}", f"train.micro_batch_size={BATCH}", "train.global_batch_size=2"),
]
OFFLOAD = ["train.offload_activations=true"]
TIMED = 3


@dataclass
class Measured:
    gradients: dict[str, Tensor]
    """After two micro-batches, on the CPU."""
    peak_bytes: int
    """Beyond what was there before."""
    seconds: float
    """Of a micro-batch forwards and backwards."""
    copied_bytes: tuple[int, int]
    host_bytes: int


def passes(state: TrainingState, count: int, seed: int) -> None:
    """Forward and backward passes of micro-batches of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    [chunk] = state.chunks
    positions = torch.arange(LENGTH, device=DEVICE).expand(BATCH, -1)
    for _ in range(count):
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator).to(DEVICE)
        chunk(tokens, positions, None, labels=tokens).mean().backward()
    torch.cuda.synchronize()


def measure(settings: list[str], seed: int) -> Measured:
    # What this process holds already is none of this state's, such as what a test before left.
    held = torch.cuda.memory_allocated()
    with default_group():
        try:
            state = build_state(compose([*SLICE, *settings]), VOCABULARY, DEVICE)
            [chunk] = state.chunks
            chunk.train()
            chunk.zero_grad_buffer()
            passes(state, 2, seed)
            found = {name: p.main_grad.cpu() for name, p in chunk.named_parameters()}
            torch.cuda.reset_peak_memory_stats()
            started = time.monotonic()
            passes(state, TIMED, seed)
            seconds = (time.monotonic() - started) / TIMED
            offload = state.megatron.offload
            return Measured(
                found,
                torch.cuda.max_memory_allocated() - held,
                seconds,
                (0, 0) if offload is None else offload.copied_bytes,
                0 if offload is None else offload.host_bytes,
            )
        finally:
            destroy_process_groups()
            state = chunk = None  # type: ignore[assignment]
            gc.collect()
            torch.cuda.empty_cache()


@pytest.mark.parametrize("recompute", ["full", "none"])
def test_gradients_are_equal_and_memory_falls(
    recompute: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # cuDNN's backward adds up by atomics; without it all that layers compute repeats.
    monkeypatch.setattr(autograd, "_cudnn_takes", lambda query, value: False)
    settings = [f"train.recompute={recompute}"]
    plain, again = measure(settings, seed), measure(settings, seed)
    there = measure([*settings, *OFFLOAD], seed)

    repeat = {n for n, grad in plain.gradients.items() if torch.equal(grad, again.gradients[n])}
    assert {name for name in plain.gradients if ".layers." in name} <= repeat
    for name in repeat:
        assert torch.equal(there.gradients[name], plain.gradients[name]), name

    plans = [
        make_overview(compose([*SLICE, *settings, *more]), 1).ranks[0].memory
        for more in ([], OFFLOAD)
    ]
    planned, host = plans[0].total - plans[1].total, plans[1].host
    assert host is not None
    fell = plain.peak_bytes - there.peak_bytes
    out, back = (copied / (2 + TIMED) for copied in there.copied_bytes)
    print(
        f"recompute {recompute}: peak {plain.peak_bytes / 1e9:.2f} -> {there.peak_bytes / 1e9:.2f} "
        f"GB, fell by {fell / 1e9:.2f}, planned {planned / 1e9:.2f}; copied {out / 1e9:.2f} GB out "
        f"and {back / 1e9:.2f} back, planned {host.microbatch_bytes / 1e9:.2f}; pinned "
        f"{there.host_bytes / 1e9:.2f} GB; {plain.seconds:.3f} -> {there.seconds:.3f} s, "
        f"{there.seconds / plain.seconds:.3f} times"
    )
    assert fell == pytest.approx(planned, rel=0.25)
    assert out == pytest.approx(host.microbatch_bytes, rel=0.15)
    assert 0.8 * out <= back <= out
