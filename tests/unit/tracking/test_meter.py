"""Speed, memory and slow ranks of a step, in one process; several ranks: tests/distributed."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import Config, Recompute
from hysparse_megatron.plan.overview import make_overview
from hysparse_megatron.runtime.clock import ForwardClock
from hysparse_megatron.tracking import meter as meter_module
from hysparse_megatron.tracking.meter import (
    Meter,
    Place,
    model_flops_per_token,
    peak_memory_bytes,
    slowest_ranks,
)

pytestmark = pytest.mark.usefixtures("group")

CPU = torch.device("cpu")
VOCABULARY = 500


def config(*overrides: str) -> Config:
    return compose(["cluster=h100", *overrides])


def meter(device: torch.device = CPU, *overrides: str, **more: Any) -> Meter:
    settings = {"clock": ForwardClock(CPU), "stage": 0, "restarts": 2, "log": print, **more}
    return Meter(config(*overrides), VOCABULARY, device=device, **settings)


def test_flops_are_the_planners_without_recompute() -> None:
    plain = config(f"model.vocab_size={VOCABULARY}")
    expected = make_overview(plain, 1).training_flops_per_token
    assert model_flops_per_token(plain, 1) == expected
    assert model_flops_per_token(config(), VOCABULARY) == expected
    again = replace(plain, train=replace(plain.train, recompute=Recompute.full))
    assert make_overview(again, 1).training_flops_per_token > expected
    assert model_flops_per_token(again, 1) == expected


def test_speed() -> None:
    row = meter().measure(1, 3000, 0.5, 0.01)
    rate = 3000 / 0.5
    assert row["tokens_per_second_per_gpu"] == rate
    flops = model_flops_per_token(config(), VOCABULARY)
    assert row["tflops_per_gpu"] == pytest.approx(rate * flops / 1e12)
    assert row["mfu"] is None, "a CPU has no peak"
    assert row["restarts"] == 2


def test_mfu_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter_module, "peak_memory_bytes", lambda device: 5e9)
    row = meter(torch.device("cuda")).measure(1, 3000, 0.5, 0.01)
    assert row["mfu"] == pytest.approx(row["tflops_per_gpu"] / 989)
    assert row["peak_memory_bytes"] == 5_000_000_000


def test_memory_is_that_of_this_process() -> None:
    before = peak_memory_bytes(CPU)
    more = torch.ones(before // 4 + 25_000_000)  # fp32: a peak above the one that there was
    grown = peak_memory_bytes(CPU)
    assert more.nbytes <= grown < before + more.nbytes + 50_000_000


def test_ranks_tell_at_the_interval_the_mean_of_the_steps_between() -> None:
    clock: Any = iter([9.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    told: list[str] = []
    measured = meter(
        CPU,
        "tracking.straggler_interval=3",
        clock=type("Clock", (), {"take": lambda self: next(clock)})(),
        log=told.append,
    )
    rows = [measured.measure(step, 3000, 1.0, step / 100) for step in range(1, 7)]
    # The first step compiles and does not count.
    assert ["slowest_ranks" in row for row in rows] == [False, False, True, False, False, True]
    assert rows[2]["forward_seconds_max"] == pytest.approx((0.1 + 0.2) / 2)
    assert rows[5]["forward_seconds_min"] == pytest.approx((0.3 + 0.4 + 0.5) / 3)
    assert rows[2]["data_seconds_max"] == pytest.approx(0.025)
    assert rows[5]["data_seconds_max"] == pytest.approx(0.05)
    assert all(row["peak_memory_bytes"] > 1e6 for row in rows)
    assert told == []


def test_slow_ranks_are_compared_inside_their_stage() -> None:
    places = [Place("a", 0), Place("a", 0), Place("a", 1), Place("b", 1), Place("b", 1)]
    slowest = slowest_ranks([1.0, 1.2, 5.0, 5.0, 9.0], places)
    assert slowest == [
        {"rank": 4, "host": "b", "seconds": 9.0, "medians": pytest.approx(1.8)},
        {"rank": 1, "host": "a", "seconds": 1.2, "medians": pytest.approx(1.2)},
        {"rank": 0, "host": "a", "seconds": 1.0, "medians": 1.0},
    ]


def test_the_clock_counts_what_runs_within(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([10.0, 12.0, 50.0, 51.5])
    stopwatch = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr("hysparse_megatron.runtime.clock.time", stopwatch)
    clock = ForwardClock(CPU)
    for _ in range(2):
        with clock.running():
            pass
    assert clock.take() == 3.5
    assert clock.take() == 0.0


def test_the_clock_does_not_count_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([10.0, 11.0, 14.0, 14.5])
    stopwatch = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr("hysparse_megatron.runtime.clock.time", stopwatch)
    clock = ForwardClock(CPU)
    with clock.running(), clock.paused():
        pass
    assert clock.take() == pytest.approx(1.5)
    with clock.paused():  # nothing runs, and nothing is looked up
        pass
    assert clock.take() == 0.0
