"""Faults on demand."""

import pytest

from hysparse_megatron.errors import ConfigError
from hysparse_megatron.runtime import faults
from hysparse_megatron.runtime.faults import VARIABLE, Fault


def arm(monkeypatch: pytest.MonkeyPatch, text: str, rank: int = 1) -> None:
    monkeypatch.setenv(VARIABLE, text)
    faults.arm(rank)


def test_entries() -> None:
    assert faults.parse("") == []
    assert faults.parse("nan@1:3, slow@0:2:prepare/30") == [
        Fault("nan", 1, 3),
        Fault("slow", 0, 2, "prepare/30"),
    ]
    places = [fault.place for fault in faults.parse("slow@0:2:5,sigint@0:1:save,sigint@0:1")]
    assert places == ["forward", "save", "forward"]
    (kill,) = faults.parse("kill_before_manifest@0:4")
    assert kill.place == "manifest"


@pytest.mark.parametrize("text", ["nan", "nan@1", "nan@x:1", "nun@1:2", "nan@1:-2"])
def test_a_mistake_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match="kind@rank:step"):
        faults.parse(text)


def test_nothing_happens_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert faults.arm(0) == []
    faults.reach("forward", 1)
    assert faults.spoil(2.0, 1) == 2.0


def test_a_fault_happens_once_on_its_rank_at_its_step_and_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arm(monkeypatch, "raise@1:3:save,spike@1:2,spike@1:2:7,nan@0:2")
    faults.reach("save", 2)
    faults.reach("forward", 3)
    with pytest.raises(RuntimeError, match="step 3"):
        faults.reach("save", 3)
    faults.reach("save", 3)
    assert faults.spoil(1.0, 1) == 1.0
    assert faults.spoil(1.0, 2) == 700.0
    assert faults.spoil(1.0, 2) == 1.0
    arm(monkeypatch, "io_error@1:4:prune")
    with pytest.raises(OSError, match="step 4"):
        faults.reach("prune", 4)
    arm(monkeypatch, "")
