"""Stop signals."""

import os
import signal
from collections.abc import Iterator

import pytest

from hysparse_megatron.training.control import STOP_SIGNALS, StopRequest
from tests.unit.single_process import DEVICE


@pytest.fixture
def stop(group: None) -> Iterator[StopRequest]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield StopRequest(DEVICE)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nobody_asked(stop: StopRequest) -> None:
    assert stop.agreed() is None


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_is_remembered(stop: StopRequest, name: str) -> None:
    os.kill(os.getpid(), signal.Signals[name])
    assert stop.agreed() == name
    assert stop.agreed() == name, "asking does not forget"


def test_a_second_signal_does_no_harm(stop: StopRequest) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.agreed() in ("SIGTERM", "SIGUSR1")
