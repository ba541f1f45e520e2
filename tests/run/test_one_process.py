"""`python -m hysparse_megatron` in one process: what it leaves, and how it goes on."""

import hashlib
import signal
import statistics
import sys
from pathlib import Path

import pytest
from run_commands import (
    TINY,
    Command,
    Copy,
    contents,
    facts,
    processes_naming,
    read_json,
    rows,
    run,
    write_text,
)

from hysparse_megatron.checkpoint.store import is_proven
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.frozen import load_frozen
from hysparse_megatron.tracking.selections import read_selections
from tests.captured import captured

pytestmark = pytest.mark.thorough

STEPS = 40


def test_files_of_a_run(finished) -> None:
    run_dir = finished.run_dir
    names = {path.name for path in run_dir.iterdir()}
    assert names - {".lock", "code.diff"} == {
        "config.yaml",
        "run.json",
        "status.json",
        "metrics.jsonl",
        "checkpoints",
        "logs",
        "selections.jsonl",
        "summary.md",
    }
    config = compose(finished.arguments)
    assert load_frozen(run_dir / "config.yaml") == config
    status = read_json(run_dir / "status.json")
    assert (status["state"], status["exit_code"], status["step"]) == ("finished", 0, STEPS)
    record = read_json(run_dir / "run.json")
    assert len(record["starts"]) == 1
    assert record["id"]
    summary = (run_dir / "summary.md").read_text()
    assert f"{STEPS} steps" in summary
    assert summary.strip() in finished.output


def test_metrics_of_a_run(finished) -> None:
    found = rows(finished.run_dir)
    steps = [row for row in found if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    for row in steps:
        assert set(row) >= {
            "step",
            "loss",
            "grad_norm",
            "learning_rate",
            "tokens",
            "tokens_per_second",
            "tokens_per_second_per_gpu",
            "tflops_per_gpu",
            "peak_memory_bytes",
            "step_seconds",
            "data_seconds",
            "skipped",
        }
        assert row["tokens"] == row["step"] * 4 * 64
        assert row["skipped"] is False
        assert row["mfu"] is None
        assert row["restarts"] == 0
        assert 1e7 < row["peak_memory_bytes"] < 1e11
        assert 0 < row["grad_norm"] < 100
    rates = [row["learning_rate"] for row in steps]
    assert rates[:2] == pytest.approx([5e-4, 1e-3])
    assert rates[-4:] == pytest.approx([7.75e-4, 5.5e-4, 3.25e-4, 1e-4])
    evaluations = [row for row in found if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 10, 20, 30, 40]
    for row in evaluations:  # layout F S F: the last oracle has no reader
        assert 0 < row["oracle_mass/layer_000"] < 1
        assert 0 < row["neighbour_agreement/layer_000"] <= 1
        assert 0 < row["sparse_gate/layer_001"] < 1
        assert "oracle_mass/layer_002" not in row
        assert row["sample_prompt"] == evaluations[0]["sample_prompt"] != ""
        assert isinstance(row["sample"], str)
        assert 0 < row["sample_seconds"] < row["eval_seconds"]
        assert f"goes on {row['sample']!r}" in finished.output
        assert 0 < row["architecture_seconds"] < row["eval_seconds"]
    assert evaluations[0]["window_sink/layer_001"] == 0 != evaluations[-1]["window_sink/layer_001"]
    selections = read_selections(finished.run_dir)
    assert sorted(selections) == [0, 10, 20, 30, 40]
    assert all(len(blocks) <= 2 for blocks in selections[40]["layers"][0])
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] - 0.2, "it must learn"


@pytest.mark.alone
def test_a_batch_costs_next_to_nothing_of_a_quickstart_step(
    corpus: list[str], tmp_path: Path
) -> None:
    quickstart = compose(["experiment=quickstart"])
    run_dir = tmp_path / "run"
    settings = [
        *corpus,
        "experiment=quickstart",
        "parallel=single",
        f"model.layout={quickstart.model.layout.replace('|', ' ')}",
        f"model.vocab_size={quickstart.data.tokenizer_vocab_size}",
        "data.tokenizer_vocab_size=300",
        "data.validation_fraction=0.2",
        "train.steps=4",
        "train.eval_batches=1",
        "optim.warmup_steps=1",
        "optim.decay_steps=1",
        f"run_dir={run_dir}",
    ]
    run(settings)
    steps = [row for row in rows(run_dir) if "loss" in row]
    share = statistics.median(row["data_seconds"] / row["step_seconds"] for row in steps)
    assert 0 < share < 0.01


def test_console_of_a_run(finished) -> None:
    lines = [line for line in finished.output.splitlines() if line.startswith("step ")]
    steps = [line for line in lines if "loss" in line and "evaluation" not in line]
    assert len(steps) == STEPS
    for word in ("loss ", "grad norm ", "lr ", "tokens/s", "ETA "):
        assert all(word in line for line in steps)
    assert "layout F S F" in finished.output


def test_checkpoints_of_a_run(finished) -> None:
    checkpoints = sorted((finished.run_dir / "checkpoints").iterdir())
    names = [path.name for path in checkpoints]
    assert names == ["step-00000020", "step-00000030", "step-00000040"]  # keep = 3
    for directory in checkpoints:
        manifest = read_json(directory / "manifest.json")
        step = int(directory.name.removeprefix("step-"))
        assert manifest["step"] == step
        assert manifest["tokens"] == step * 4 * 64
        assert {"config_hash", "data", "parallel", "versions"} <= manifest.keys()
        there = {
            str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()
        }
        assert there - {"proven"} == {*manifest["files"], "manifest.json"}
        assert is_proven(directory) == (step < 40)  # no step has followed the last one
        for name, entry in manifest["files"].items():
            content = (directory / name).read_bytes()
            assert len(content) == entry["bytes"]
            assert hashlib.sha256(content).hexdigest() == entry["sha256"]


@pytest.mark.parametrize("how", ["the same command", "its frozen configuration"])
def test_a_finished_run_stays_as_it_is(how: str, finished, copy_of_finished: Copy) -> None:
    run_dir, arguments = copy_of_finished(STEPS)
    if how == "its frozen configuration":
        text = (run_dir / "config.yaml").read_text()
        (run_dir / "config.yaml").write_text(text.replace(str(finished.run_dir), str(run_dir)))
        arguments = ["--config", str(run_dir / "config.yaml")]
    before = contents(run_dir)
    output = run(arguments)
    assert "is finished: step 40 of 40" in output
    after = contents(run_dir)
    # What was started is written down; results are not touched.
    for name in (*before, *after):
        if name not in ("run.json", "config.yaml", ".lock"):
            assert after.get(name) == before.get(name), name
    assert len(read_json(run_dir / "run.json")["starts"]) == 2
    # A copy beside its original is a run of its own: one run of the tracker cannot hold both.
    assert f"WARNING: {run_dir} is a copy of {finished.run_dir.resolve()}" in output
    assert read_json(run_dir / "run.json")["id"] != read_json(finished.run_dir / "run.json")["id"]


def test_more_steps_and_other_settings_continue(copy_of_finished: Copy, finished) -> None:
    run_dir, arguments = copy_of_finished(STEPS)
    more = [*arguments, "train.steps=44", "optim.learning_rate=2e-3", "optim.decay_steps=0"]
    before = contents(run_dir)
    output = run(more, code=2)
    assert "the learning rate of step 41, the next after" in output
    assert "would be 0.002 in place of 0.0001 " in output
    assert contents(run_dir) == before
    output = run([*more, "optim.accept_schedule_change=true"])
    assert "WARNING: the learning rate of step 41" in output
    assert "resuming after step 40" in output
    assert "train.steps: 40 -> 44" in output
    assert "optim.learning_rate: 0.001 -> 0.002" in output
    found = rows(run_dir)
    before = rows(finished.run_dir)
    assert found[: len(before)] == before
    assert [row["step"] for row in found[len(before) :]] == [41, 42, 43, 44, 44]
    assert [row["restarts"] for row in found[len(before) : -1]] == [1] * 4
    # A setting is obeyed, or refused; what the checkpoint brings along must not win silently.
    assert [row["learning_rate"] for row in found[len(before) : -1]] == pytest.approx([2e-3] * 4)
    status = read_json(run_dir / "status.json")
    assert (status["state"], status["step"]) == ("finished", 44)


def test_killed_and_preempted_runs_repeat_the_straight_one_bit_for_bit(
    finished, settings: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = [*settings, f"run_dir={run_dir}"]
    first = Command(arguments)
    first.wait_for("saved ")  # while training goes on
    first.send(signal.SIGKILL)
    assert first.finish() == -signal.SIGKILL
    assert read_json(run_dir / "status.json")["state"] == "running"

    second = Command(arguments)
    second.wait_for("resuming after step")
    second.wait_for("tokens/s")  # its first step
    second.send(signal.SIGTERM)
    assert second.finish() == 3, second.output
    status = read_json(run_dir / "status.json")
    assert (status["state"], status["exit_code"]) == ("preempted", 3)
    assert "SIGTERM" in status["cause"]
    newest = max((run_dir / "checkpoints").iterdir())
    stopped_at = int(newest.name.removeprefix("step-"))
    assert 10 < stopped_at < 40
    assert rows(run_dir)[-1]["step"] == stopped_at, "nothing is lost"

    output = run(arguments)
    assert f"resuming after step {stopped_at}" in output
    assert facts(run_dir) == facts(finished.run_dir)
    assert len(read_json(run_dir / "run.json")["starts"]) == 3
    assert processes_naming(str(run_dir)) == []


def test_a_blend_with_masks_and_skipped_steps(tmp_path: Path) -> None:
    """Two prepared folders, one of them with all the weight but a little, through a whole run."""
    for number, name in enumerate(("first", "second")):
        corpus = write_text(tmp_path / f"{name}-text", number)
        prepared = [sys.executable, "-m", "tools.prepare_data", "--tokenizer", "bytes", "--quiet"]
        split = ["--validation-fraction", "0.4", "--output", str(tmp_path / name)]
        captured([*prepared, *split, str(corpus)])
    settings = [
        *TINY,
        f"data.blend='3 {tmp_path}/first; 1 {tmp_path}/second'",
        "data.document_mask=true",
        "data.skip_steps=1-2",
        "train.steps=3",
        "optim.warmup_steps=1",
        "optim.decay_steps=1",
        f"run_dir={tmp_path}/run",
    ]
    run(settings)
    manifest = read_json(tmp_path / "run" / "checkpoints" / "step-00000003" / "manifest.json")
    assert manifest["data"]["source"].startswith("3.0 ")
    assert "; 1.0 " in manifest["data"]["source"]
    # Other weights are other data.
    other = [one.replace("3 /", "2 /") for one in settings]
    output = run([*other, "train.steps=4"], code=5)
    assert "the data changed since" in output
