"""`python -m launch.local --nproc 4`: tensor parallel 2 x pipeline parallel 2, cut in a block."""

import math
import re
import signal
from pathlib import Path

import pytest

from hysparse_megatron.checkpoint.store import problems_of
from hysparse_megatron.checkpoint.tensors import OPTIMIZER, read_index
from tests.run.run_commands import LOCAL, TINY, Command, facts, processes_naming, read_json, run


def test_preempted_in_the_middle_and_continued(data: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = [
        "--nproc",
        "4",
        *TINY,
        *data,
        "parallel=tp2_pp2",
        "model.layout=F S | S F",
        "train.steps=40",
        "checkpoint.interval=1000",
        f"run_dir={run_dir}",
    ]
    with Command(arguments, entry=LOCAL) as first:
        first.wait_for("step  3/40")
        first.send(signal.SIGTERM)
        assert first.finish() == 3, first.output
    assert "reads on from oracle 0 across the cut" in first.output
    (told,) = re.findall(r"([\d,]+) parameters on 4 model-parallel ranks", first.output)
    (saved,) = (run_dir / "checkpoints").iterdir()
    weights = [entry for name, entry in read_index(saved).items() if not name.startswith(OPTIMIZER)]
    # The embedding, on both stages, and the norms, on all ranks, once.
    assert int(told.replace(",", "")) == sum(math.prod(entry["shape"]) for entry in weights)
    assert first.output.count("stopped by SIGTERM") == 1, "an error all ranks share is told once"
    assert processes_naming(str(run_dir)) == []
    assert read_json(run_dir / "status.json")["state"] == "preempted"
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    assert problems_of(checkpoint) == []
    stopped_at = int(checkpoint.name.removeprefix("step-"))
    assert 3 <= stopped_at < 40
    before = facts(run_dir)

    output = run(arguments, entry=LOCAL)
    assert f"resuming after step {stopped_at}" in output
    assert read_json(run_dir / "status.json")["exit_code"] == 0
    after = facts(run_dir)
    assert {key: after[key] for key in before} == before
    assert sorted(step for step, is_evaluation in after if not is_evaluation) == [*range(1, 41)]
    assert after[40, True]["eval_loss"] < after[0, True]["eval_loss"] - 0.2
    # One process finds the same held-out loss, in other batches.
    scores = tmp_path / "scores.json"
    evaluation = ["--run-dir", str(run_dir), "--batch-size", "3", "--json", str(scores)]
    run(evaluation, entry=("-m", "tools.evaluate"))
    (found,) = read_json(scores)["loss"]
    assert found["all"]["loss"] == pytest.approx(after[40, True]["eval_loss"], abs=1e-5)
    assert found["all"]["tokens"] == after[40, True]["eval_tokens"]
    assert processes_naming(str(run_dir)) == []
