"""Which ends of a start put its job back into the queue."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from hysparse_megatron.rundir import lock
from hysparse_megatron.status import read_status, stamp, write_json
from launch.requeue import RECORD, Decision, decide, main
from tests.captured import Call


def after(
    status: dict[str, Any],
    record: dict[str, Any] | None = None,
    *,
    this_start: bool = True,
    told: bool = False,
    max_restarts: int = 2,
) -> Decision:
    return decide(
        status, record or {}, is_of_this_start=this_start, told=told, max_restarts=max_restarts
    )


def failed(step: int | None, code: int = 1) -> dict[str, Any]:
    return {"state": "failed", "exit_code": code, "cause": "rank 3 fell", "checkpoint_step": step}


def test_a_preemption_always_goes_on() -> None:
    status = {"state": "preempted", "exit_code": 3, "cause": "SIGUSR1", "checkpoint_step": 40}
    decision = after(status, {"checkpoint_step": 40, "failures": 2})
    assert decision == Decision(True, "pre-empted: SIGUSR1", 0, 40)


def test_a_failure_goes_on_after_progress_only() -> None:
    first = after(failed(40))
    assert (first.goes_on, first.failures, first.checkpoint_step) == (True, 1, 40)
    again = after(failed(40), vars(first))
    assert not again.goes_on
    assert "no checkpoint after step 40" in again.reason
    assert not after(failed(None)).goes_on


def test_failures_in_a_row_are_limited() -> None:
    record: dict[str, Any] = {}
    for step, goes_on in ((10, True), (20, True), (30, False)):
        decision = after(failed(step), record)
        assert decision.goes_on is goes_on
        record = vars(decision)
    between = after({"state": "preempted", "checkpoint_step": 40}, record)
    assert after(failed(50), vars(between)).goes_on, "a pre-emption begins a new count"


@pytest.mark.parametrize("code", [2, 4, 5, 6])
def test_what_would_come_again_stops(code: int) -> None:
    decision = after(failed(40, code))
    assert not decision.goes_on
    assert f"exit code {code}" in decision.reason


def test_finished_is_finished() -> None:
    status = {"state": "finished", "exit_code": 0, "checkpoint_step": 100}
    assert after(status) == after(status, this_start=False)
    assert after(status).reason == "finished"
    # Of a run that was to be trained on nobody knows yet what this start would have done.
    assert after(status, this_start=False, told=True).goes_on


@pytest.mark.parametrize("told", [True, False])
def test_an_end_before_the_beginning(told: bool) -> None:
    """Pre-empted while Python was still importing: nobody wrote a status."""
    old = {"state": "failed", "exit_code": 1, "checkpoint_step": 10}
    assert after(old, this_start=False, told=told).goes_on is told
    assert after({}, this_start=False, told=told).goes_on is told


def run_of(path: Path, started: float, **facts: Any) -> list[str]:
    write_json(path / "status.json", {"started": stamp(started), "pid": 1, **facts})
    return ["--max-restarts", "2", "--started", str(int(time.time()) - 60), str(path)]


def test_the_command_prints_and_remembers(tmp_path: Path, call: Call) -> None:
    arguments = run_of(tmp_path, time.time(), **failed(7))
    assert call(main, arguments).out.startswith(
        "requeue: failed: rank 3 fell; it had got to step 7"
    )
    assert json.loads((tmp_path / RECORD).read_text())["checkpoint_step"] == 7
    assert call(main, arguments).out.startswith("leave: ")


def test_an_end_without_a_word_is_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All ranks killed at once: the status still says that the run is running."""
    main(run_of(tmp_path, time.time(), state="running", checkpoint_step=3))
    assert capsys.readouterr().out.startswith("requeue: failed: the ranks ended without a word")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)


def test_a_status_of_an_earlier_start_does_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = run_of(tmp_path, time.time() - 3600, state="preempted", checkpoint_step=3)
    main(arguments)
    assert capsys.readouterr().out.startswith("leave: it ended before it had begun")
    main(["--told", "1", *arguments])
    assert capsys.readouterr().out.startswith("requeue: told to stop")


def test_a_garbled_record_counts_as_none(tmp_path: Path, call: Call) -> None:
    (tmp_path / RECORD).write_text("{")
    assert call(main, run_of(tmp_path, time.time(), **failed(7))).out.startswith("requeue: ")


@pytest.mark.parametrize("seconds", [-3600, -10, 10])
@pytest.mark.parametrize("wrote", [True, False])
def test_clocks_decide_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: int, wrote: bool
) -> None:
    """The script compares the status before and after a start; another node's clock may be off."""
    run_of(tmp_path, time.time() + seconds, **failed(7))
    assert main(["--max-restarts", "2", "--wrote", str(int(wrote)), str(tmp_path)]) == 0
    expected = "requeue: failed: rank 3 fell" if wrote else "leave: it ended before it had begun"
    assert capsys.readouterr().out.startswith(expected)


@pytest.mark.parametrize("content", ["", "[]", '{"started": 7, "checkpoint_step": "x"}'])
def test_a_garbled_status_is_decided_upon(tmp_path: Path, call: Call, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    for known in (["--wrote", "1"], ["--started", "5"]):
        assert call(main, ["--max-restarts", "2", *known, str(tmp_path)]).out.startswith("leave: ")
    (tmp_path / "status.json").write_text('{"state": "running", "checkpoint_step": 3}')
    assert (
        "the ranks ended without a word"
        in call(main, ["--max-restarts", "2", "--wrote", "1", str(tmp_path)]).out
    )


def test_the_status_of_a_run_that_holds_the_directory_is_not_this_jobs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "status.json", {"state": "running", "checkpoint_step": 50})
    held, _ = lock(tmp_path)
    with held:
        assert main([str(tmp_path), "--max-restarts", "3", "--wrote", "1"]) == 0
    assert capsys.readouterr().out.startswith("leave: it ended before it had begun")
    assert read_status(tmp_path)["state"] == "running"
