"""The clock of forward passes on a GPU: kernels count, the host's work does not."""

import time

import pytest
import torch

from hysparse_megatron.runtime.clock import ForwardClock


def test_kernels_count_and_nothing_waits_for_them() -> None:
    clock = ForwardClock(torch.device("cuda"))
    torch.cuda.synchronize()
    started = time.monotonic()
    for _ in range(2):
        with clock.running():
            torch.cuda._sleep(200_000_000)  # cycles: about a tenth of a second
    launched = time.monotonic() - started
    torch.cuda.synchronize()
    taken = time.monotonic() - started
    time.sleep(0.2)
    counted = clock.take()
    assert launched < taken / 2
    assert counted == pytest.approx(taken, rel=0.2)
    assert clock.take() == 0.0
    with clock.running(), clock.paused():
        torch.cuda._sleep(200_000_000)
    assert clock.take() < 0.01
