"""The learning rate of every step against the formulas the settings describe."""

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hysparse_megatron.config.schema import OptimConfig, Schedule, TrainConfig
from hysparse_megatron.training.optimizer import build_schedule, set_step

HIGH, LOW = 3e-3, 2e-4


def expected(optim: OptimConfig, steps: int, step: int) -> float:
    """The rate of update number `step` from 0."""
    n = step + 1
    warmup = optim.warmup_steps
    if n <= warmup:
        return HIGH * n / warmup
    if optim.schedule is Schedule.constant:
        return HIGH
    if optim.schedule is Schedule.wsd:
        decay = steps // 10 if optim.decay_steps is None else optim.decay_steps
        left = steps - n
        return HIGH if left >= decay else LOW + (HIGH - LOW) * left / decay
    decay = steps - warmup if optim.decay_steps is None else optim.decay_steps
    if n - warmup >= decay:
        return LOW
    return LOW + (HIGH - LOW) * (1 + math.cos(math.pi * (n - warmup) / decay)) / 2


def optim_of(schedule: Schedule, warmup: int, decay: int | None, **more: Any) -> OptimConfig:
    return OptimConfig(
        learning_rate=HIGH,
        min_learning_rate=LOW,
        schedule=schedule,
        warmup_steps=warmup,
        decay_steps=decay,
        **more,
    )


def rates(optim: OptimConfig, steps: int, order: list[int]) -> list[float]:
    optimizer: Any = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=123.0)
    train = TrainConfig(steps=steps, global_batch_size=1, micro_batch_size=1, seq_length=8)
    schedule = build_schedule(optim, train, optimizer)
    found = []
    for step in order:
        set_step(schedule, step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@st.composite
def runs(draw: st.DrawFn) -> tuple[OptimConfig, int]:
    """What `validate` lets pass: warm-up and decay fit into the run."""
    steps = draw(st.integers(1, 60))
    kind = draw(st.sampled_from(Schedule))
    default = steps // 10 if kind is Schedule.wsd else 0
    warmup = draw(st.integers(0, steps - default))
    decay = draw(st.none() | st.integers(0, steps - warmup))
    return optim_of(kind, warmup, decay), steps


@given(runs())
@hypothesis_settings(max_examples=300)
def test_every_step_of_every_schedule(run: tuple[OptimConfig, int]) -> None:
    optim, steps = run
    got = rates(optim, steps, list(range(steps)))
    assert got == pytest.approx([expected(optim, steps, step) for step in range(steps)], rel=1e-9)
    assert all(0 < rate <= HIGH * (1 + 1e-12) for rate in got)


@pytest.mark.parametrize("kind", list(Schedule))
def test_the_order_of_asking_does_not_matter(kind: Schedule, rng: random.Random) -> None:
    steps = 40
    order = list(range(steps)) * 2
    rng.shuffle(order)
    optim = optim_of(kind, 7, 11)
    in_order = rates(optim, steps, list(range(steps)))
    assert rates(optim, steps, order) == [in_order[step] for step in order]


def test_corners_of_wsd() -> None:
    got = rates(optim_of(Schedule.wsd, 4, 5), 20, list(range(20)))
    assert got[0] == pytest.approx(HIGH / 4)  # the first update is not wasted
    assert got[3:15] == pytest.approx([HIGH] * 12)
    assert got[15] < HIGH
    assert got[19] == pytest.approx(LOW)


def test_weight_decay_is_constant() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer: Any = torch.optim.SGD([{"params": [parameter], "wd_mult": 0.5}], lr=1.0)
    train = TrainConfig(steps=9, global_batch_size=1, micro_batch_size=1, seq_length=8)
    schedule = build_schedule(optim_of(Schedule.wsd, 2, 3, weight_decay=0.3), train, optimizer)
    for step in range(9):
        set_step(schedule, step)
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.15)
