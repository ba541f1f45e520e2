"""Which steps are recorded, by whom, and what becomes of the trace."""

import contextlib
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile, record_function

from hysparse_megatron.config.debug import ProfileConfig, ProfileTool
from hysparse_megatron.errors import ConfigError, Preempted
from hysparse_megatron.runtime import step_profile

TOTAL = 6


class Run:
    """Steps of a run of `TOTAL` that computes something in each, and what it says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.said: list[str] = []
        self.lost: list[OSError] = []

    def train(
        self, settings: ProfileConfig, rank: int = 0, done: int = 0, stop_after: int = TOTAL
    ) -> None:
        with step_profile.profiled(
            settings, self.path, rank, done, self.said.append, self.lost.append
        ) as around:
            for step in range(done + 1, TOTAL + 1):
                with around(step), record_function(f"inside {step}"):
                    torch.ones(3, requires_grad=True).sum().backward()
                with record_function(f"after {step}"):
                    pass
                if step == stop_after < TOTAL:
                    raise Preempted("asked to stop")

    def files(self) -> dict[str, set[str]]:
        """The names in every trace, by its file; nothing else is in the folder."""
        folder = self.path / "profile"
        return {path.name: names(path) for path in sorted(folder.iterdir())}


def names(path: Path) -> set[str]:
    with gzip.open(path) as file:
        return {event["name"] for event in json.load(file)["traceEvents"]}


def steps(found: set[str]) -> set[str]:
    return {name for name in found if name.startswith(("step ", "inside ", "after "))}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def test_the_chosen_steps_and_what_lies_between_them(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run.train(ProfileConfig(step_range=[2, 3]))
    [(name, found)] = run.files().items()
    assert name == "rank0-steps-2-to-3.json.gz"
    assert steps(found) == {"step 2", "inside 2", "after 2", "step 3", "inside 3"}
    assert {"aten::sum", "autograd::engine::evaluate_function: SumBackward0"} <= found
    assert run.said == ["profiling steps 2 to 3 on rank 0 with torch"]
    told = f"rank 0: the profile of steps 2 to 3 is {run.path / 'profile' / name}\n"
    assert capsys.readouterr().out == told
    assert run.lost == []


def test_other_ranks_and_other_runs_record_nothing(run: Run) -> None:
    run.train(ProfileConfig(step_range=[2, 3], ranks=[1, 2]), rank=0)
    assert run.said == ["profiling steps 2 to 3 on rank 1, 2 with torch"]
    run.train(ProfileConfig())
    assert len(run.said) == 1
    assert not run.path.exists()


def test_a_start_between_them_records_the_rest(run: Run) -> None:
    run.train(ProfileConfig(step_range=[2, 4], ranks=[5]), rank=5, done=3)
    [(name, found)] = run.files().items()
    assert name == "rank5-step-4.json.gz"
    assert steps(found) == {"step 4", "inside 4"}


def test_a_start_after_them_says_so(run: Run) -> None:
    run.train(ProfileConfig(step_range=[2, 4]), done=4)
    [told] = run.said
    assert "[2, 4] lie before step 5, where this start goes on" in told
    assert not run.path.exists()


def test_a_stop_between_them_keeps_what_was_recorded(run: Run) -> None:
    with pytest.raises(Preempted):
        run.train(ProfileConfig(step_range=[2, 5]), stop_after=3)
    [(name, found)] = run.files().items()
    assert name == "rank0-steps-2-to-3.json.gz"
    assert steps(found) == {"step 2", "inside 2", "after 2", "step 3", "inside 3", "after 3"}


def test_a_stop_before_them_and_a_crash_leave_nothing(run: Run) -> None:
    with pytest.raises(Preempted):
        run.train(ProfileConfig(step_range=[3, 5]), stop_after=2)
    with (
        pytest.raises(RuntimeError),
        step_profile.profiled(
            ProfileConfig(step_range=[1, 2]), run.path, 0, 0, run.said.append, run.lost.append
        ) as around,
        around(1),
    ):
        raise RuntimeError("a bug")
    assert not run.path.exists()
    run.train(ProfileConfig(step_range=[1, 1]))  # the next one is not in the crashed one's way
    assert run.files().keys() == {"rank0-step-1.json.gz"}


def test_a_folder_that_cannot_be_made_is_told(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.path.mkdir()
    (run.path / "profile").write_text("in the way")
    run.train(ProfileConfig(step_range=[2, 3]))
    [error] = run.lost
    assert "profile" in str(error)
    assert "WARNING: rank 0: " in capsys.readouterr().err


@pytest.mark.parametrize("written", ["", '{"traceEvents": [{"name": "step 2'])
def test_a_trace_that_is_not_whole_is_told(
    run: Run, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    """The profiler writes what it can, to a full disk too, and raises nothing."""
    monkeypatch.setattr(
        profile, "export_chrome_trace", lambda self, path: Path(path).write_text(written)
    )
    run.train(ProfileConfig(step_range=[2, 3]))
    assert len(run.lost) == 1
    assert "could not write all of its trace" in str(run.lost[0])
    assert run.files() == {}


def test_nsys_is_given_the_steps_as_a_range(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    @contextlib.contextmanager
    def emit() -> Iterator[None]:
        calls.append("nvtx on")
        yield
        calls.append("nvtx off")

    record: Any = lambda name: contextlib.nullcontext(calls.append(name))  # noqa: E731
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", emit)
    monkeypatch.setattr(step_profile, "record_function", record)
    run.train(ProfileConfig(step_range=[2, 3], tool=ProfileTool.nsys))
    assert calls == ["start", "nvtx on", "step 2", "step 3", "nvtx off", "stop"]
    assert not run.path.exists()


def test_nsys_needs_a_gpu() -> None:
    cpu = torch.device("cpu")
    settings = ProfileConfig(step_range=[2, 3], tool=ProfileTool.nsys)
    with pytest.raises(ConfigError, match=r"debug\.profile\.tool: nsys needs a CUDA device"):
        step_profile.refuse_unusable(settings, cpu)
    step_profile.refuse_unusable(settings, torch.device("cuda"))
    step_profile.refuse_unusable(ProfileConfig(tool=ProfileTool.nsys), cpu)
    step_profile.refuse_unusable(ProfileConfig(step_range=[2, 3]), cpu)
