"""`metrics.jsonl` as it is after kills and restarts, and the console."""

import json
from pathlib import Path

import pytest

from hysparse_megatron.config.compose import compose
from hysparse_megatron.tracking.metrics import (
    Console,
    MetricsFile,
    by_evaluation,
    chart_values,
    read_metrics,
    results,
)
from tests.unit.tracking.metric_rows import evaluation, row, write


def test_rows_come_back_bit_exact(tmp_path: Path) -> None:
    rows = [evaluation(0, 5.1), row(1, 0.1 + 0.2), row(2, 1e-300), evaluation(2, 4.9)]
    write(tmp_path / "m", rows)
    assert read_metrics(tmp_path / "m") == rows
    assert [json.loads(line) for line in (tmp_path / "m").read_text().splitlines()] == rows


def test_a_row_is_on_disk_before_the_file_is_closed(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "m")
    metrics.write(row(1))
    assert read_metrics(tmp_path / "m") == [row(1)]
    metrics.close()


def test_the_last_row_of_a_step_wins(tmp_path: Path) -> None:
    write(tmp_path / "m", [row(1, 1.0), row(2, 2.0), evaluation(2, 9.0), row(3, 3.0)])
    again = [row(2, 2.5), evaluation(2, 9.5), row(3, 3.5)]
    write(tmp_path / "m", again)
    assert read_metrics(tmp_path / "m") == [row(1, 1.0), *again]


def test_what_a_start_went_back_from_is_no_part_of_the_run(tmp_path: Path) -> None:
    """As after `checkpoint.step=2` with a shorter run and other evaluations."""
    rows = [evaluation(0, 5.0), row(1), row(2), evaluation(2, 4.0), row(3), row(4)]
    write(tmp_path / "m", [*rows, evaluation(4, 8.0), row(5), row(6), evaluation(6, 9.0)])
    write(tmp_path / "m", [row(3, 3.5)])
    assert read_metrics(tmp_path / "m") == [*rows[:4], row(3, 3.5)]
    write(tmp_path / "m", [row(4, 3.4), row(5, 3.3), evaluation(5, 3.0)])
    again = [row(3, 3.5), row(4, 3.4), row(5, 3.3), evaluation(5, 3.0)]
    assert read_metrics(tmp_path / "m") == [*rows[:4], *again]
    # A start that makes up for an evaluation has gone back by its first step.
    write(tmp_path / "m", [evaluation(4, 3.2), row(5, 3.1)])
    assert read_metrics(tmp_path / "m")[4:] == [*again[:2], evaluation(4, 3.2), row(5, 3.1)]


def test_every_set_keeps_its_rows(tmp_path: Path) -> None:
    """Rows of runs before there were several have no name: they are of the run's own split."""
    own, code = {"evaluation": "validation"}, {"evaluation": "code"}
    rows = [
        evaluation(2, 9.0),
        row(2),
        {**evaluation(2, 7.0), **code},
        {**evaluation(2, 8.0), **own},
    ]
    write(tmp_path / "m", rows)
    found = read_metrics(tmp_path / "m")
    assert found == [rows[1], rows[2], rows[3]]
    assert by_evaluation(found) == {"code": [rows[2]], "validation": [rows[3]]}
    assert set(chart_values(rows[2])) == {"eval/eval_loss/code", "eval/eval_seconds/code"}
    assert set(chart_values(rows[3])) == {"eval/eval_loss", "eval/eval_seconds"}


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_garbled_last_line_is_left_out(tmp_path: Path, cut: int) -> None:
    write(tmp_path / "m", [row(1), row(2)])
    text = (tmp_path / "m").read_text()
    (tmp_path / "m").write_text(text + text.splitlines()[1][:cut])
    assert read_metrics(tmp_path / "m") == [row(1), row(2)]


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_restart_loses_nothing_to_a_garbled_line_before_it(tmp_path: Path, cut: int) -> None:
    write(tmp_path / "m", [row(1), row(2)])
    text = (tmp_path / "m").read_text()
    (tmp_path / "m").write_text(text + text.splitlines()[1][:cut])
    write(tmp_path / "m", [row(3), row(4)])
    assert read_metrics(tmp_path / "m") == [row(1), row(2), row(3), row(4)]


TORN = [
    b"\xff\xfe{",
    b"7",
    b"null",
    b'"text"',
    b"[]",
    b'{"loss": 1.0}',
    b'{"step": "3"}',
    b"[" * 9**6,
]


@pytest.mark.parametrize("torn", TORN)
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_what_is_no_row_is_left_out_and_told(
    tmp_path: Path, torn: bytes, end: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m"
    write(path, [row(1), row(2)])
    with path.open("ab") as file:
        file.write(torn + end)
    write(path, [row(3)])
    assert read_metrics(path) == [row(1), row(2), row(3)]
    told = capsys.readouterr().err
    assert told == f"warning: {path}: 1 lines that are no rows are left out, first line 3\n"


def test_results_of_equal_runs_are_equal() -> None:
    measured = {
        "tokens_per_second_per_gpu": 5.0,
        "tflops_per_gpu": 0.1,
        "mfu": None,
        "peak_memory_bytes": 1,
        "restarts": 3,
        "forward_seconds_median": 0.2,
        "slowest_ranks": [],
    }
    shown = {"step", "loss", "grad_norm", "learning_rate", "tokens", "skipped", "moe_load"}
    assert results(row(3, **measured, moe_load=1.5)).keys() == shown
    assert results(evaluation(3, 4.0)) == {"step": 3, "eval_loss": 4.0}


def test_not_a_number_survives(tmp_path: Path) -> None:
    write(tmp_path / "m", [row(1, float("nan"), skipped=True)])
    (found,) = read_metrics(tmp_path / "m")
    assert found["loss"] != found["loss"]
    assert found["skipped"] is True


def test_console_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("hysparse_megatron.tracking.metrics.time.monotonic", lambda: now[0])
    train = compose(["train.steps=200", "train.global_batch_size=8"]).train
    console = Console(train)
    batch = {"global_batch_size": 8}
    for step in (101, 102):
        now[0] += 60.0  # two steps in two minutes: 98 to go
        console.step(
            row(step, 2.34567, grad_norm=1.5, tokens_per_second=12345.6, samples=8 * step, **batch)
        )
    assert capsys.readouterr().out.splitlines()[-1] == (
        "step 102/200  loss 2.3457  grad norm 1.500  lr 1.00e-03  12,346 tokens/s  ETA 1:38:00"
    )
    console.step(row(199, samples=8 * 199, skipped=True, **batch))
    line = capsys.readouterr().out
    assert line.endswith("ETA 0:40  SKIPPED\n")
    console.step(row(200, samples=8 * 200, mfu=0.4123, tokens_per_second=5.0, **batch))
    assert "  5 tokens/s  MFU 41.2 %  ETA 0:00" in capsys.readouterr().out


def test_the_eta_of_a_ramp_counts_samples(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("hysparse_megatron.tracking.metrics.time.monotonic", lambda: now[0])
    ramp = ["train.batch_ramp=[2,2,12]", "train.global_batch_size=8", "train.steps=7"]
    console = Console(compose(ramp).train)
    now[0] += 30.0  # of sizes 2 2 4 6 8 8 8 the first two are done
    console.step(row(1, samples=2, global_batch_size=2))
    now[0] += 30.0
    console.step(row(2, samples=4, global_batch_size=2))
    assert "ETA 8:30" in capsys.readouterr().out.splitlines()[-1]


def test_a_long_run_prints_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(compose(["train.steps=238419"]).train, interval=100)
    batch = {"global_batch_size": 8}
    for step in range(206, 501):
        console.step(row(step, skipped=step == 333, **batch, samples=8 * step))
    told = [int(line.split("/")[0].split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert told == [206, 300, 333, 400, 500]
    console.step(row(238_419, **batch, samples=8 * 238_419))
    assert "step 238419/238419" in capsys.readouterr().out


def test_lines_by_the_length_of_a_run() -> None:
    lengths = {steps: compose([]).tracking.steps_between_lines(steps) for steps in LENGTHS}
    assert lengths == {1: 1, 1000: 1, 1001: 10, 100_000: 10, 238_419: 100}
    assert compose(["tracking.log_interval=7"]).tracking.steps_between_lines(238_419) == 7


LENGTHS = (1, 1000, 1001, 100_000, 238_419)
