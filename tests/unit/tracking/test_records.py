"""Who gets a row, and what the trackers are told about the run."""

import errno
import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import Preempted
from hysparse_megatron.plan.overview import make_overview
from hysparse_megatron.reserve import RESERVE_FILE, Reserve
from hysparse_megatron.rundir import RunDirectory
from hysparse_megatron.tracking import records
from hysparse_megatron.tracking.metrics import MetricsFile
from hysparse_megatron.tracking.records import describe_run, recorded

STEP = {
    "step": 1,
    "loss": 2.0,
    "grad_norm": 1.0,
    "learning_rate": 1e-3,
    "tokens_per_second": 5.0,
    "skipped": False,
    "samples": 8,
    "global_batch_size": 8,
}
EVALUATION = {
    "step": 1,
    "evaluation": "validation",
    "eval_loss": 1.9,
    "eval_tokens": 2048,
    "eval_perplexity": 6.686,
}
NAMED = {**EVALUATION, "evaluation": "code", "eval_loss": 0.7, "eval_perplexity": 2.014}


class Fake:
    """A tracker that keeps what it is given."""

    made: list["Fake"]

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.rows: list[dict[str, Any]] = []
        self.closed: list[int] = []
        self.made.append(self)
        self.log = self.rows.append
        self.close = self.closed.append


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    Fake.made = []
    monkeypatch.setattr(records, "Tracker", Fake)
    monkeypatch.setattr(records, "TensorBoard", Fake)
    return Fake.made


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return compose([f"run_dir={tmp_path / 'run'}", "tracking.tensorboard=true", "train.steps=9"])


def record(config: Config, directory: RunDirectory, said: list[str], error: Any = None) -> None:
    facts = {"world_size": 4}
    with (
        ExitStack() as at_last,
        recorded(config, directory, 0, facts, said.append, pytest.fail, at_last) as on_row,
    ):
        for row in (STEP, EVALUATION, NAMED):
            for hook in on_row:
                hook(row)
        if error is not None:
            raise error


def test_lines_come_at_the_interval_that_is_set(
    tmp_path: Path, made: list[Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first and the last step too; the file has all of them."""
    overrides = [f"run_dir={tmp_path / 'run'}", "train.steps=9", "tracking.log_interval=4"]
    config = compose(overrides)
    directory = RunDirectory(config)
    with recorded(config, directory, 0, {}, print, pytest.fail, ExitStack()) as on_row:
        for step in range(1, 10):
            for hook in on_row:
                hook({**STEP, "step": step, "samples": 8 * step})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in lines] == ["step 1", "step 4", "step 8", "step 9"]
    assert len(directory.metrics.read_text().splitlines()) == 9


def test_everybody_gets_every_row(config: Config, made: list[Fake]) -> None:
    directory = RunDirectory(config)
    said: list[str] = []
    record(config, directory, said)
    wandb, tensorboard = made
    assert wandb.rows == tensorboard.rows == [STEP, EVALUATION, NAMED]
    assert [json.loads(line) for line in directory.metrics.read_text().splitlines()] == wandb.rows
    assert wandb.closed == tensorboard.closed == [0]
    assert said == [
        "step 1: evaluation loss 1.9000, perplexity 6.69 (2,048 tokens)",
        "step 1: evaluation on code: loss 0.7000, perplexity 2.01 (2,048 tokens)",
    ]
    assert json.loads((directory.path / "status.json").read_text())["step"] == 1
    facts = wandb.arguments[4]
    assert facts["model"]["layout"] == config.model.layout
    assert facts["run"]["starts"][0]["versions"]["torch"]
    assert facts["world_size"] == 4
    directory.close()


@pytest.mark.parametrize(("error", "code"), [(Preempted("x"), 3), (ValueError("x"), 1)])
def test_trackers_learn_how_it_ended(
    config: Config, made: list[Fake], error: Exception, code: int
) -> None:
    directory = RunDirectory(config)
    with pytest.raises(type(error)):
        record(config, directory, [], error)
    assert [fake.closed for fake in made] == [[code], [code]]
    directory.close()


def test_ranks_without_a_directory_record_nothing(config: Config, made: list[Fake]) -> None:
    with recorded(config, None, 0, {}, print, pytest.fail, ExitStack()) as on_row:
        assert on_row == []
    assert made == []


def test_tensorboard_goes_on_where_the_run_does(
    config: Config, made: list[Fake], tmp_path: Path
) -> None:
    directory: Any = SimpleNamespace(
        path=config.run_path,
        metrics=config.run_path.parent / "m",
        facts={"id": "x"},
        reserve=Reserve(tmp_path),
    )
    with recorded(config, directory, 7, {}, print, pytest.fail, ExitStack()):
        pass
    assert made[1].arguments[:2] == (config.run_path, 7)


def test_parameters_are_the_planners() -> None:
    config = compose(["model.moe.num_experts=8", "model.moe.num_active_experts=2"])
    known = compose(
        ["model.moe.num_experts=8", "model.moe.num_active_experts=2", "model.vocab_size=300"]
    )
    expected = make_overview(known, 1).parameters
    assert describe_run(config, 300, 16) == {
        "world_size": 16,
        "parameters": {"total": expected.total, "active": expected.active},
    }


class FullDisk:
    """A file system without room for a byte while the reserve is there, or for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, reserve: Path, for_ever: bool) -> None:
        self.is_full = False
        write = MetricsFile.flush

        def flush(file: MetricsFile) -> None:
            if self.is_full and (for_ever or reserve.exists()):
                raise OSError(errno.ENOSPC, "No space left on device")
            write(file)

        monkeypatch.setattr(MetricsFile, "flush", flush)


@pytest.mark.parametrize("for_ever", [False, True])
def test_a_full_disk_loses_no_row_that_can_be_kept_and_is_told(
    config: Config, made: list[Fake], monkeypatch: pytest.MonkeyPatch, for_ever: bool
) -> None:
    """The other ranks learn of it by a flag: an error here alone would leave them waiting."""
    directory = RunDirectory(config)
    disk = FullDisk(monkeypatch, directory.path / RESERVE_FILE, for_ever)
    lost: list[OSError] = []
    with recorded(config, directory, 0, {}, [].append, lost.append, ExitStack()) as on_row:
        for row in (STEP, EVALUATION, NAMED):
            disk.is_full = row is not STEP
            for hook in on_row:
                hook(row)
            assert bool(lost) is disk.is_full
        disk.is_full = for_ever
    assert {error.errno for error in lost} == {errno.ENOSPC}
    kept = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert kept == ([STEP] if for_ever else [STEP, EVALUATION, NAMED])
    directory.write_status("failed", exit_code=6)
    assert json.loads((directory.path / "status.json").read_text())["state"] == "failed"
    directory.close()


def test_rows_that_come_late_are_not_torn(tmp_path: Path) -> None:
    """A write that got half a row down goes on from there."""
    metrics = MetricsFile(tmp_path / "m")
    file: Any = metrics._file
    left = [7]

    def write(content: bytes) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = file.write(content[: left[0]])
        left[0] -= done
        return done

    metrics._file = SimpleNamespace(write=write, close=file.close)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            metrics.write(STEP)
    left[0] = 10**6
    metrics.write(EVALUATION)
    metrics.close()
    kept = [json.loads(line) for line in (tmp_path / "m").read_text().splitlines()]
    assert kept == [STEP, STEP, EVALUATION]
