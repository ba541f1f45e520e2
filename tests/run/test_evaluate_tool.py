"""`python -m tools.evaluate` on a run: held-out loss, questions, mistakes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from run_commands import run, write_text

from hysparse_megatron.data.run_tokenizer import load_run_tokenizer
from hysparse_megatron.evaluation.tasks import TASKS
from hysparse_megatron.tracking.metrics import by_evaluation, read_metrics
from tests.unit.evaluation.copying import copy_from
from tools import evaluate

pytestmark = pytest.mark.thorough

EVALUATE = ("-m", "tools.evaluate")


def test_the_loss_is_the_one_that_training_told(finished, tmp_path: Path) -> None:
    """And the summary, without being told which samples; here computed in other batches."""
    output = tmp_path / "loss.json"
    arguments = ["--run-dir", str(finished.run_dir), "--batch-size", "3"]
    told = run([*arguments, "--bins", "4", "--json", str(output)], entry=EVALUATE)
    (found,) = json.loads(output.read_text())["loss"]
    last = by_evaluation(read_metrics(finished.run_dir / "metrics.jsonl"))["validation"][-1]
    assert found["all"]["loss"] == pytest.approx(last["eval_loss"], abs=1e-5)
    assert found["all"]["tokens"] == last["eval_tokens"]
    assert f"-> {last['eval_loss']:.4f} at step" in (finished.run_dir / "summary.md").read_text()
    assert "note" not in told
    assert [one["first"] for one in found["bins"]] == [0, 16, 32, 48]
    assert sum(one["tokens"] for one in found["bins"]) == found["all"]["tokens"] == 4 * 64
    assert "perplexity" in told


def test_other_text_is_read_with_the_tokenizer_of_the_run(
    finished, seed: int, tmp_path: Path
) -> None:
    """Which was trained on the run's data, and is found by its hash."""
    text = write_text(tmp_path / "text", seed=seed)
    arguments = ["--run-dir", str(finished.run_dir), "--sequences", "2", "--data", str(text)]
    told = run([*arguments, "--bins", "1"], entry=EVALUATE)
    assert "held-out loss in 2 sequences of 64 tokens" in told
    assert "note: training evaluated 4 sequences" in told
    assert "note: training evaluated its own data" in told


def test_a_hardly_trained_model_answers_nothing(finished, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    arguments = ["--run-dir", str(finished.run_dir), "--json", str(output), "--samples", "4"]
    told = run([*arguments, "--tasks", "needle", "word_count", "--lengths", "300"], entry=EVALUATE)
    scores = json.loads(output.read_text())["scores"]
    assert [(one["task"], one["length"], one["mean"]) for one in scores] == [
        ("needle", 300, 0.0),
        ("word_count", 300, 0.0),
    ]
    assert "300 tokens, but the model was trained on 64 at a time" in told
    assert "8 questions of up to 300 tokens" in told
    assert "0.0 % is the level of chance" in told


def test_a_copying_model_answers_everything(finished, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the run's model, with the run's tokenizer on the way in and out."""
    manifest = next((finished.run_dir / "checkpoints").glob("*/manifest.json"))
    sha256 = json.loads(manifest.read_text())["data"]["tokenizer_sha256"]

    def copy(loaded, prompts, settings):
        tokenizer = load_run_tokenizer(loaded.config.data, sha256)
        said = [tokenizer.encode(f" {copy_from(tokenizer.decode(ids))}.") for ids in prompts]
        assert all(len(ids) <= settings.max_new_tokens for ids in said)
        return SimpleNamespace(tokens=said)

    monkeypatch.setattr("hysparse_megatron.inference.generate.generate", copy)
    scores = list(
        evaluate._scores(
            SimpleNamespace(tokenizer=None, samples=3, seed=5, batch_size=2),
            SimpleNamespace(
                config=evaluate_config(finished.run_dir),
                tokenizer_sha256=sha256,
                checkpoint="x",
                data={},
            ),
            list(TASKS),
            [1500],
        )
    )
    assert {score.task: score.mean for score in scores} == dict.fromkeys(TASKS, 1.0)


def evaluate_config(run_dir: Path):
    from hysparse_megatron.inference.load import inference_config

    return inference_config(run_dir, 1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tasks", "needle", "--lengths", "10"], 2, "allowed at least"),
        (["--tasks", "nothing"], 2, "invalid choice"),
        (["--tasks", "needle", "--data", "."], 2, "--data changes nothing of needle"),
        (["--samples", "4"], 2, "--samples changes nothing of loss"),
        (["--lengths", "0"], 2, "allowed a whole number from 1"),
        (["--data", ""], 2, "--data: is empty"),
        (["--tokenizer", ""], 2, "--tokenizer: is empty"),
        (["--json", "/dev/null/x"], 2, "cannot write"),
        (["--json", "/dev/full"], 6, "--json: cannot write /dev/full (No space left on device)"),
        (["--checkpoint", "77"], 6, "77"),
    ],
)
def test_mistakes(finished, arguments: list[str], code: int, message: str) -> None:
    told = run(["--run-dir", str(finished.run_dir), *arguments], entry=EVALUATE, code=code)
    assert message in told
