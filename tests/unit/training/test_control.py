"""Stop flags of one rank: signals, deadline, stop file, and polling while something else runs."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hysparse_megatron.errors import DataError, OutputError, Preempted
from hysparse_megatron.runtime.signals import STOP_SIGNALS
from hysparse_megatron.training import control
from hysparse_megatron.training.control import Deadline, Flag, Signals, Watch
from tests.unit.single_process import DEVICE


@pytest.fixture
def signals() -> Iterator[Signals]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    descriptor = signal.set_wakeup_fd(-1)
    yield Signals()
    signal.set_wakeup_fd(descriptor)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nohup_is_heeded() -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    descriptor = signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        Signals()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGQUIT) != before[signal.SIGQUIT]
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture
def watch(group: None, signals: Signals, tmp_path: Path) -> Watch:
    return Watch(DEVICE, signals, Deadline(None, {}), tmp_path / "stop")


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_nobody_asked(watch: Watch) -> None:
    assert watch.poll() == {}
    assert watch.stopping is None


def test_a_stop_file_that_cannot_be_looked_for_is_none(
    group: None, signals: Signals, tmp_path: Path
) -> None:
    unreadable = tmp_path / ("s" * 300)
    with pytest.raises(OSError, match="File name too long"):
        unreadable.exists()
    watch = Watch(DEVICE, signals, Deadline(None, {}), unreadable)
    assert watch.poll() == {}


def test_changed_data_end_the_run(watch: Watch) -> None:
    problems: list[DataError] = []
    watch.data_problem = lambda: problems[0] if problems else None
    watch.poll()
    problems.append(DataError("train.bin: contents differ"))
    with pytest.raises(DataError, match=r"train\.bin: contents differ"):
        watch.poll()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP", "SIGQUIT"])
def test_a_signal_is_known_to_the_next_poll(watch: Watch, name: str) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5)  # no other thread runs unless this one waits for it
    os.kill(os.getpid(), signal.Signals[name])
    found = watch.poll()
    sys.setswitchinterval(interval)
    assert found == {Flag[name]: 0}
    assert watch.stopping == f"{name} on rank 0"
    assert watch.poll() == {Flag[name]: 0}, "asking does not forget"


def test_the_third_signal_ends_the_rank(
    signals: Signals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(control.os, "_exit", ended.append)
    for count, name in enumerate(("SIGTERM", "SIGUSR1", "SIGTERM"), start=1):
        assert ended == []
        os.kill(os.getpid(), signal.Signals[name])
        wait_until(lambda count=count: len(signals.received) == count)
    wait_until(lambda: bool(ended))
    assert ended == [128 + signal.SIGTERM]
    told = capfd.readouterr().err
    assert "SIGUSR1 ignored: already stopping" in told
    assert "leaving without saving" in told


def test_flags_of_the_guard_stop_nobody(watch: Watch) -> None:
    assert watch.poll([Flag.LOSS_SPIKE]) == {Flag.LOSS_SPIKE: 0}
    assert watch.stopping is None


def test_the_stop_file(watch: Watch, tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    watch.poll()
    assert watch.stopping == "stop file on rank 0"
    watch.forget_stop_file()
    watch.forget_stop_file()
    assert not (tmp_path / "stop").exists()


def test_a_stop_file_that_cannot_be_deleted_hides_no_end(
    watch: Watch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stop").mkdir()
    watch.forget_stop_file()
    assert f"{tmp_path / 'stop'} cannot be deleted" in capsys.readouterr().err


def test_deadlines() -> None:
    assert Deadline(None, {}).end is None
    assert not Deadline(None, {}).is_near()
    now = time.time()
    assert Deadline(2.0, {}).end == pytest.approx(now + 120, abs=5)
    slurm = {"SLURM_JOB_END_TIME": str(int(now) + 1000)}
    assert Deadline(None, slurm).end == int(now) + 1000
    assert Deadline(2.0, slurm).end == pytest.approx(now + 120, abs=5), "what was asked for wins"
    assert Deadline(None, {"SLURM_JOB_END_TIME": "Unknown"}).end is None


def test_the_reserve_follows_what_was_measured() -> None:
    deadline = Deadline(10.0, {})
    assert deadline.reserve() == pytest.approx(60 + 2, abs=1)
    deadline.saw_step(400.0)
    assert not deadline.is_near(), "the first step compiles: the ones after it are not as long"
    deadline.saw_step(3.0)
    deadline.saw_save(100.0)
    deadline.saw_save(20.0)
    assert deadline.reserve() == pytest.approx(150 + 6 + 2)
    deadline.saw_save(1000.0)
    assert deadline.is_near()


def test_work_is_attended(watch: Watch) -> None:
    assert watch.attend(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        watch.attend(lambda: 1 // 0)


def test_a_stop_ends_work(watch: Watch, tmp_path: Path) -> None:
    release = threading.Event()
    threading.Timer(0.2, (tmp_path / "stop").touch).start()
    with pytest.raises(Preempted, match="stop file on rank 0 before any step"):
        watch.attend(lambda: release.wait(60))
    release.set()


def test_output_that_is_lost_stops_the_run(watch: Watch, tmp_path: Path) -> None:
    watch.require_output()
    watch.lose_output(OSError(28, "No space left on device"))
    watch.lose_output(OSError(5, "Input/output error"))
    assert watch.poll() == {Flag.LOST_OUTPUT: 0}
    ending = watch.ending("after step 7; saved at step 7")
    assert isinstance(ending, OutputError)
    assert ending.exit_code == 6
    assert f"{tmp_path} cannot be written ([Errno 28] No space left on device)" in str(ending)
    with pytest.raises(OutputError, match="before any step of this start"):
        watch.stop_before_first_step()
    with pytest.raises(OutputError, match="after the last step, which is saved"):
        watch.require_output()
