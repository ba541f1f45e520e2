"""Profiles of real runs, and runs that repeat, by the commands that users type."""

import gzip
import json
from pathlib import Path

import pytest
from run_commands import LOCAL, TINY, facts, read_json, run

from hysparse_megatron.runtime.annotations import FULL_ATTENTION, LOSS, OPTIMIZER, SPARSE_ATTENTION
from hysparse_megatron.runtime.faults import VARIABLE

pytestmark = pytest.mark.thorough

SHORT = [*TINY, "train.steps=6", "checkpoint.interval=2"]


def names(trace: Path) -> set[str]:
    with gzip.open(trace) as file:
        return {event["name"] for event in json.load(file)["traceEvents"]}


def steps(found: set[str]) -> set[str]:
    return {name for name in found if name.startswith("step ")}


@pytest.mark.distributed
def test_a_profile_on_one_of_two_ranks_over_a_stop(corpus: list[str], tmp_path: Path) -> None:
    """Each start records its steps of the range; the last one has none left."""
    run_dir = tmp_path / "run"
    profile = ["debug.profile.step_range=[2,4]", "debug.profile.ranks=[1]"]
    arguments = ["--nproc", "2", *SHORT, *corpus, *profile, f"run_dir={run_dir}"]
    folder = run_dir / "profile"
    expected: list[str] = []
    for fault, code, told, wrote in [
        ("sigterm@0:3", 3, "profiling steps 2 to 4 on rank 1", "rank1-steps-2-to-3.json.gz"),
        ("sigterm@0:5", 3, "profiling step 4 on rank 1", "rank1-step-4.json.gz"),
        ("", 0, "[2, 4] lie before step 6", None),
    ]:
        output = run(arguments, entry=LOCAL, **{VARIABLE: fault}, code=code)
        assert told in output
        expected += [wrote] if wrote else []
        assert sorted(path.name for path in folder.iterdir()) == sorted(expected)
        if wrote:
            assert str(folder / wrote) in output
    parts = {FULL_ATTENTION, SPARSE_ATTENTION, LOSS, OPTIMIZER}
    first, second = (names(folder / name) for name in expected)
    assert parts <= first
    assert parts <= second
    assert steps(first) == {"step 2", "step 3"}
    assert steps(second) == {"step 4"}


def test_a_profile_that_cannot_be_written_stops_after_its_step(
    corpus: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "profile").write_text("in the way")
    arguments = [*SHORT, *corpus, "debug.profile.step_range=[2,3]", f"run_dir={run_dir}"]
    output = run(arguments, code=6)
    assert "OutputError" in output
    assert "stopped after step 4; saved at step 4" in output
    status = read_json(run_dir / "status.json")
    assert (status["exit_code"], status["checkpoint_step"]) == (6, 4)
    run(arguments)  # nothing is left to profile


def test_deterministic_runs_are_equal_to_the_bit(corpus: list[str], tmp_path: Path) -> None:
    """With experts and dropout, whose operations have most to choose from; the second time with
    activations on the host, which changes no number."""
    arguments = [
        *SHORT,
        *corpus,
        "debug.deterministic=true",
        "model.hidden_dropout=0.1",
        "model.moe.num_experts=4",
        "model.moe.num_active_experts=2",
    ]
    on_host = ["train.offload_activations=true", "train.offload_min_bytes=0"]
    for name, more in (("a", []), ("b", on_host)):
        output = run([*arguments, *more, f"run_dir={tmp_path / name}"])
        assert ("wait for the backward pass in host memory" in output) is bool(more)
        assert "deterministic algorithms only, with CUBLAS_WORKSPACE_CONFIG=:4096:8" in output
    found = facts(tmp_path / "a")
    assert len(found) == 8
    assert facts(tmp_path / "b") == found


@pytest.mark.parametrize(
    ("setting", "variables", "told"),
    [
        ("debug.deterministic=true", {"NCCL_ALGO": "Tree"}, "debug.deterministic: true, but NCCL"),
        ("debug.memory_snapshot=true", {}, "debug.memory_snapshot: true needs a CUDA device"),
        ("debug.profile={step_range:[1,2],tool:nsys}", {}, "debug.profile.tool: nsys needs a CUDA"),
        ("debug.profile={step_range:[5,7]}", {}, "got [5, 7]; allowed steps up to train.steps = 6"),
        ("debug.profile={step_range:[1,2],ranks:[1]}", {}, "got [1]; allowed ranks below the"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(
    setting: str, variables: dict[str, str], told: str, corpus: list[str], tmp_path: Path
) -> None:
    output = run([*SHORT, *corpus, setting, f"run_dir={tmp_path / 'run'}"], **variables, code=2)
    assert told in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
