"""Faults 8, 11 to 16 and 18: checkpoints that are damaged, in the way, cut off or not deleted."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hysparse_megatron.checkpoint.store import problems_of
from tests.fault.faulty_runs import FOUR_RANKS, STEPS, FaultyRun, assert_equal
from tests.run.run_commands import contents, facts

NewRun = Callable[..., FaultyRun]


def names(run: FaultyRun) -> list[str]:
    return sorted(path.name for path in (run.run_dir / "checkpoints").iterdir())


def test_a_signal_during_a_save_beside_training_waits_for_it(
    straight: FaultyRun, new_run: NewRun
) -> None:
    run, beside = new_run(), "checkpoint.asynchronous=true"
    output = run.run(beside, code=3, fault="sigterm@1:4:write,slow@1:4:write/2")
    stopped = run.status()["step"]
    assert run.checkpoints() == [4, stopped]
    for step in (4, stopped):
        assert problems_of(run.checkpoint(step)) == []
        assert output.count(f"saved {run.checkpoint(step)} ") == 1
    assert output.index("step  5/") < output.index("saved "), "training did not wait"
    run.assert_ended("preempted", 3, 1, f"SIGTERM on rank 1 after step {stopped}")
    output = run.run(beside, code=0)
    assert f"resuming after step {stopped}" in output
    assert facts(run.run_dir) == facts(straight.run_dir)


def test_killed_between_the_files_and_the_manifest(straight: FaultyRun, new_run: NewRun) -> None:
    run = new_run()
    run.run(code=1, fault="kill_before_manifest@0:8")
    run.assert_ended("failed", 1, 0, "rank 0 was killed by SIGKILL")
    assert_unfinished(run, 8, writers=[0])  # of data-parallel ranks the first writes for all
    output = run.run(code=0)
    assert "resuming after step 4" in output
    assert names(run) == ["step-00000004", "step-00000008", "step-00000012"]
    assert facts(run.run_dir) == facts(straight.run_dir)


def assert_unfinished(run: FaultyRun, step: int, writers: Sequence[int]) -> None:
    """The newest checkpoint has everything but its manifest and its name."""
    unfinished = names(run)[-1]
    assert unfinished.startswith(f"{run.checkpoint(step).name}.tmp-")
    written = {path.name for path in (run.run_dir / "checkpoints" / unfinished).iterdir()}
    assert written >= {f"__{rank}_0.distcp" for rank in writers}
    assert "manifest.json" not in written


def test_junk_where_checkpoints_belong(straight: FaultyRun, new_run: NewRun) -> None:
    run = new_run()
    run.take_over(straight, 4)
    run.checkpoint(8).mkdir()
    (run.checkpoint(8) / "notes.txt").write_text("of others")
    (run.run_dir / "checkpoints" / "step-12").write_text("a file")
    (run.run_dir / "checkpoints" / "step-of-others").mkdir()
    output = run.run(code=0)
    for name in ("step-00000008", "step-12"):
        assert f"a newer checkpoint is damaged and left out: {run.run_dir}/checkpoints/{name}" in (
            output
        )
    assert "resuming after step 4" in output
    assert facts(run.run_dir) == facts(straight.run_dir)
    assert run.checkpoints() == [4, 8, STEPS]
    [aside] = (run.run_dir / "checkpoints").glob("step-00000008.aside-*")
    assert (aside / "notes.txt").read_text() == "of others"


def test_junk_that_appears_where_the_next_checkpoint_belongs(new_run: NewRun) -> None:
    """Rank 0 alone looks; all end by what it saw."""
    run = new_run()
    command = run.start(fault="slow@0:6:3")
    command.wait_for("step  5/")
    run.checkpoint(8).mkdir()
    assert command.finish() == 6, command.output
    run.assert_nothing_left()
    told = f"{run.checkpoint(8)} exists already and is not written over"
    assert f"CheckpointError: {told}" in command.output
    assert "RankFailure" not in command.output, "no rank had to lose another one"
    run.assert_ended("failed", 6, None, told)
    assert run.checkpoints() == [4]
    assert list(run.checkpoint(8).iterdir()) == []


def flip_a_byte(checkpoint: Path) -> Path:
    """In the last rank's file."""
    shard = max(checkpoint.glob("__*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return shard


def cut(checkpoint: Path) -> Path:
    shard = max(checkpoint.glob("__*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    return shard


def lose_the_manifest(checkpoint: Path) -> Path:
    (checkpoint / "manifest.json").unlink()
    return checkpoint / "manifest.json"


def empty_the_manifest(checkpoint: Path) -> Path:
    (checkpoint / "manifest.json").write_text("")
    return checkpoint / "manifest.json"


def fill_the_manifest(checkpoint: Path) -> Path:
    (checkpoint / "manifest.json").write_text('{"step": 8, "files": "all"}')
    return checkpoint / "manifest.json"


DAMAGES = [flip_a_byte, cut, lose_the_manifest, empty_the_manifest, fill_the_manifest]


@pytest.mark.parametrize("damage", [flip_a_byte, cut, fill_the_manifest])
def test_a_damaged_checkpoint_that_was_asked_for(
    damage: Callable[[Path], Path], straight: FaultyRun, new_run: NewRun
) -> None:
    run = new_run()
    run.take_over(straight, 8)
    damaged = damage(run.checkpoint(8))
    before = contents(run.run_dir / "checkpoints")
    output = run.run("checkpoint.step=8", code=6)
    told = f"{run.checkpoint(8)} is damaged or missing: {damaged}"
    assert f"CheckpointError: {told}" in output
    run.assert_ended("failed", 6, None, told)
    assert contents(run.run_dir / "checkpoints") == before


def test_all_damaged_ones_are_named_and_the_one_before_is_taken(new_run: NewRun) -> None:
    run = new_run()
    run.run("checkpoint.interval=2", "checkpoint.keep=0", code=0)
    steps = run.checkpoints()[1:]
    damaged = [damage(run.checkpoint(step)) for damage, step in zip(DAMAGES, steps, strict=True)]
    expected = facts(run.run_dir)
    (run.run_dir / "metrics.jsonl").unlink()
    output = run.run("checkpoint.interval=4", code=0)
    warnings = output.partition("resuming after step 2 ")[0]
    for path in damaged:
        assert f"WARNING: a newer checkpoint is damaged and left out: {path}" in warnings
    assert facts(run.run_dir) == {key: row for key, row in expected.items() if key[0] > 2}


def test_four_ranks_stopped_then_killed_in_a_save_then_damaged(
    straight_four: FaultyRun, new_run: NewRun
) -> None:
    """Tensor parallel 2, pipeline parallel 2: faults 6, 11 and 13, bit-equal all the same."""
    run = new_run(ranks=4)
    run.run(*FOUR_RANKS, code=3, fault="sigterm@2:6")
    run.assert_ended("preempted", 3, 2, "SIGTERM on rank 2 after step 6; saved at step 6")

    output = run.run(*FOUR_RANKS, code=1, fault="kill_before_manifest@0:8")
    assert "resuming after step 6" in output
    expected = facts(straight_four.run_dir)
    assert (8, True) in facts(run.run_dir)
    assert facts(run.run_dir).items() <= expected.items()
    assert run.checkpoints() == [4, 6]
    assert_unfinished(run, 8, writers=range(4))

    damaged = flip_a_byte(run.checkpoint(6))
    assert damaged.name == "__3_0.distcp"
    told = f"{damaged} has another content than the manifest says"
    output = run.run(*FOUR_RANKS, "checkpoint.step=6", code=6)
    assert told in output
    run.assert_ended("failed", 6, None, told)

    output = run.run(*FOUR_RANKS, code=0)
    assert f"WARNING: a newer checkpoint is damaged and left out: {told}" in output
    assert "resuming after step 4" in output
    assert run.checkpoints() == [4, 8, STEPS]
    assert list((run.run_dir / "checkpoints").glob("*.tmp-*")) == []
    assert facts(run.run_dir) == expected
    assert_equal(run.tensors(STEPS), straight_four.tensors(STEPS))


def test_only_damaged_checkpoints_are_no_fresh_start(straight: FaultyRun, new_run: NewRun) -> None:
    run = new_run()
    run.take_over(straight, 8)
    damaged = [flip_a_byte(run.checkpoint(4)), lose_the_manifest(run.checkpoint(8))]
    before = contents(run.run_dir / "checkpoints")
    metrics = (run.run_dir / "metrics.jsonl").read_bytes()
    output = run.run(code=6)
    assert "CheckpointError: no checkpoint is valid: " in output
    assert all(str(path) in output for path in damaged)
    run.assert_ended("failed", 6, None, "no checkpoint is valid")
    assert contents(run.run_dir / "checkpoints") == before
    assert (run.run_dir / "metrics.jsonl").read_bytes() == metrics


def test_a_full_disk_during_a_save(new_run: NewRun) -> None:
    """Of the second rank's machine, beside training; both write."""
    run = new_run()
    settings = ["parallel.tp=2", "checkpoint.asynchronous=true"]
    output = run.run(*settings, code=6, fault="full_disk@1:8:write")
    told = "step-00000008 was not written; rank 1: OSError: [Errno 27] File too large"
    assert told in output
    assert f"{run.checkpoint(8)}.tmp-" in output
    assert "/__1_0.distcp has 100 of at least " in output
    assert " bytes free" in output
    run.assert_ended("failed", 6, None, "step-00000008 was not written; rank 1")
    assert names(run) == ["step-00000004"]
    assert problems_of(run.checkpoint(4)) == []


def test_a_deletion_that_fails(new_run: NewRun) -> None:
    run = new_run()
    output = run.run("checkpoint.keep=1", code=0, fault="io_error@0:4:prune")
    assert f"WARNING: {run.checkpoint(4)} could not be deleted: [Errno 5]" in output
    # After step 9 the one of step 4 stood; after the last step it could be deleted. No good step
    # followed the last one, so that the one before stays.
    assert names(run) == ["step-00000008", "step-00000012"]
    assert problems_of(run.checkpoint(STEPS)) == []
    assert run.row(STEPS)["step"] == STEPS
