"""Runs on one text, with several evaluation sets, and without any evaluation."""

import json
from pathlib import Path

import pytest
from run_commands import TINY, run, write_text

from hysparse_megatron.tracking.metrics import by_evaluation, read_metrics
from tools.report import main as report

pytestmark = pytest.mark.thorough

SHORT = [*TINY, "train.steps=2", "optim.warmup_steps=0", "optim.decay_steps=1"]


@pytest.fixture
def one_text(tmp_path: Path) -> Path:
    """A corpus of a single file."""
    documents = write_text(tmp_path / "documents", seed=5)
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(file.read_text() for file in sorted(documents.iterdir())))
    return path


def test_every_set_has_its_loss(one_text: Path, tmp_path: Path) -> None:
    """The one that tools.evaluate finds too."""
    other = write_text(tmp_path / "other", seed=6)
    run_dir, cache = tmp_path / "run", f"data.cache_dir={tmp_path / 'cache'}"
    sets = f"data.evaluation={{other: '{other}'}}"
    told = run([*SHORT, f"run_dir={run_dir}", f"data.path={one_text}", cache, sets])
    assert "evaluation on samples of 64 tokens: 4 of validation, 4 of other" in told
    rows = by_evaluation(read_metrics(run_dir / "metrics.jsonl"))
    assert [row["step"] for row in rows["validation"]] == [0, 2]
    assert [row["step"] for row in rows["other"]] == [0, 2]
    first, last = rows["other"]
    assert "oracle_mass/layer_000" not in last
    summary = (run_dir / "summary.md").read_text()
    assert f"evaluation on other: loss {first['eval_loss']:.4f} at step 0" in summary
    assert "evaluation loss, other" in page(run_dir)

    output = tmp_path / "loss.json"
    arguments = ["--run-dir", str(run_dir), "--data", str(other), "--json", str(output)]
    run(arguments, entry=("-m", "tools.evaluate"))
    (found,) = json.loads(output.read_text())["loss"]
    assert found["all"]["loss"] == pytest.approx(last["eval_loss"], abs=1e-5)
    assert found["all"]["tokens"] == last["eval_tokens"]

    # Another text by that name would go on in its curve.
    changed = [f"data.evaluation={{other: '{one_text}'}}", "train.steps=3"]
    told = run([*SHORT, f"run_dir={run_dir}", f"data.path={one_text}", cache, *changed], code=5)
    assert "data.evaluation.other changed since" in told


def test_without_evaluation_no_text_is_too_short(tmp_path: Path) -> None:
    """For a validation split, that is."""
    text = tmp_path / "note.txt"
    text.write_text("some words of which none can be spared, " * 20)
    run_dir = tmp_path / "run"
    arguments = [*SHORT, f"run_dir={run_dir}", f"data.path={text}"]
    arguments.append(f"data.cache_dir={tmp_path / 'cache'}")
    told = run(arguments, code=5)
    assert "fewer than one sample of 64 + 1" in told
    assert "train.eval_batches=0" in told
    run([*arguments, "train.eval_batches=0", "data.validation_fraction=0"])
    assert "no evaluation: train.eval_batches is 0" in (run_dir / "summary.md").read_text()
    assert by_evaluation(read_metrics(run_dir / "metrics.jsonl")) == {}
    page(run_dir)


def page(run_dir: Path) -> str:
    """What tools.report draws."""
    assert report([str(run_dir)]) == 0
    return (run_dir / "report.html").read_text()
