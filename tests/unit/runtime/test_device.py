"""How many cores a process takes for itself."""

import os

import pytest
import torch

from hysparse_megatron.config.schema import ParallelConfig
from hysparse_megatron.runtime import device
from hysparse_megatron.runtime.launcher import Rank


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no share of the cores")
@pytest.mark.parametrize("given", [None, "3"])
def test_a_given_number_of_threads_stays(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch has read the variable; without one, the ranks of a machine share its cores."""
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    device.start(Rank(0, 1, 0, 1), ParallelConfig(timeout_seconds=60))
    device.stop()
    assert taken == ([8] if given is None else [])
