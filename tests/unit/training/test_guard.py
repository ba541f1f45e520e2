"""Which steps are bad."""

import json

import pytest

from hysparse_megatron.config.schema import GuardConfig
from hysparse_megatron.training.control import Flag
from hysparse_megatron.training.guard import Guard, reason

CONFIG = GuardConfig(max_bad_steps=3, spike_window=4, loss_spike=2.0, grad_norm_spike=10.0)
NAN = float("nan")


def with_past(config: GuardConfig = CONFIG) -> Guard:
    guard = Guard(config)
    for loss in (8.0, 3.0, 2.0, 2.0, 2.0):  # the first one is beyond the window
        guard.record(loss, 1.0, bad=False)
    return guard


def test_what_is_not_finite_is_bad_from_the_first_step() -> None:
    guard = Guard(CONFIG)
    assert guard.judge(True, 5.0, 1.0) == []
    assert guard.judge(True, 5.0, float("inf")) == [Flag.GRADIENT_NOT_FINITE]
    assert guard.judge(False, NAN, NAN) == [Flag.LOSS_NOT_FINITE, Flag.GRADIENT_NOT_FINITE]


@pytest.mark.parametrize(
    ("loss", "grad_norm", "flags"),
    [
        (4.0, 10.0, []),
        (4.01, 1.0, [Flag.LOSS_SPIKE]),
        (2.0, 10.1, [Flag.GRADIENT_SPIKE]),
        (200.0, 100.0, [Flag.LOSS_SPIKE, Flag.GRADIENT_SPIKE]),
    ],
)
def test_spikes_stand_out_of_the_median(loss: float, grad_norm: float, flags: list[Flag]) -> None:
    assert with_past().judge(True, loss, grad_norm) == flags


def test_no_spikes_without_a_past_or_a_window() -> None:
    guard = Guard(CONFIG)
    for _ in range(3):
        assert guard.judge(True, 1e9, 1e9) == []
        guard.record(1.0, 1.0, bad=False)
    off = GuardConfig(spike_window=0)
    assert with_past(off).judge(True, 1e9, 1e9) == []


def test_bad_steps_are_no_past_and_are_counted() -> None:
    guard = with_past()
    before = guard.facts()["losses"]
    for _ in range(2):
        guard.record(100.0, NAN, bad=True)
    assert guard.facts()["losses"] == before
    assert (guard.skipped, guard.is_lost) == (2, False)
    guard.record(2.0, 1.0, bad=False)
    for _ in range(3):
        assert not guard.is_lost
        guard.record(NAN, NAN, bad=True)
    assert guard.is_lost
    assert guard.skipped == 5


def test_facts_survive_json_exactly() -> None:
    guard = with_past()
    guard.record(1 / 3, 0.1, bad=False)
    again = Guard(CONFIG, json.loads(json.dumps(guard.facts())))
    assert again.facts() == guard.facts()
    assert again.judge(True, 4.01, 1.0) == [Flag.LOSS_SPIKE]


def test_reasons_name_a_rank_where_it_is_one_ranks() -> None:
    assert reason({}) is None
    assert reason({Flag.SIGTERM: 1}) is None
    assert reason({Flag.GRADIENT_NOT_FINITE: 3, Flag.LOSS_NOT_FINITE: 1}) == (
        "loss not finite on rank 1"
    )
    assert reason({Flag.GRADIENT_SPIKE: 3}) == "gradient spike"
