"""Checkpoints of whole runs: killed, stopped or out of space while one is written."""

import signal
from pathlib import Path

import pytest
from run_commands import Command, Copy, contents, facts, read_json, run

from hysparse_megatron.checkpoint.store import problems_of

pytestmark = pytest.mark.thorough

MAIN = """
from hysparse_megatron.__main__ import main
code = main()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""

KILLED_BEFORE_THE_MANIFEST = f"""
import os, signal, sys
from hysparse_megatron.checkpoint import writer
writer.write_manifest = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
{MAIN}"""

SLOW_DISK = f"""
import os, sys, time
from hysparse_megatron.checkpoint.staging import StagingWriter
write = StagingWriter.write
def slow(self):
    print(f"writing {{self._file.parent.name}}", flush=True)
    time.sleep(float(os.environ["SECONDS_OF_A_SAVE"]))
    write(self)
StagingWriter.write = slow
{MAIN}"""


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_killed_between_the_shards_and_the_manifest(copy_of_finished: Copy, finished) -> None:
    run_dir, arguments = copy_of_finished(20)
    run(arguments, entry=("-c", KILLED_BEFORE_THE_MANIFEST), code=-signal.SIGKILL)
    complete, unfinished = names(run_dir)
    assert complete == "step-00000020"
    assert unfinished.startswith("step-00000030.tmp-")
    assert (run_dir / "checkpoints" / unfinished / "__0_0.distcp").exists(), "all but the manifest"
    output = run(arguments)
    assert "resuming after step 20" in output
    assert names(run_dir) == ["step-00000020", "step-00000030", "step-00000040"]
    assert facts(run_dir) == facts(finished.run_dir)


def test_a_signal_during_a_save_waits_for_it(copy_of_finished: Copy, finished) -> None:
    run_dir, arguments = copy_of_finished(20)
    with Command(arguments, entry=("-c", SLOW_DISK), SECONDS_OF_A_SAVE="3") as first:
        first.wait_for("writing step-00000030")
        first.send(signal.SIGTERM)
        assert first.finish() == 3, first.output
    stopped_at = int(names(run_dir)[-1].removeprefix("step-"))
    assert f"saved at step {stopped_at}" in first.output
    for name in names(run_dir):
        assert problems_of(run_dir / "checkpoints" / name) == []
        assert first.output.count(f"writing {name}") == (int(name.removeprefix("step-")) > 20)
    assert read_json(run_dir / "status.json")["state"] == "preempted"
    output = run(arguments)
    assert f"resuming after step {stopped_at}" in output
    assert facts(run_dir) == facts(finished.run_dir)


def test_the_end_waits_for_the_last_save(copy_of_finished: Copy) -> None:
    run_dir, arguments = copy_of_finished(30)
    output = run(arguments, entry=("-c", SLOW_DISK), SECONDS_OF_A_SAVE="2")
    assert names(run_dir) == ["step-00000020", "step-00000030", "step-00000040"]
    assert output.index("saved") < output.index("hysparse generate --run-dir")


def test_both_ways_of_saving_write_the_same(copy_of_finished: Copy, finished) -> None:
    run_dir, arguments = copy_of_finished(20)
    run([*arguments, "checkpoint.asynchronous=false"])
    assert facts(run_dir) == facts(finished.run_dir)
    for step in ("step-00000030", "step-00000040"):
        both = [str(path / "checkpoints" / step) for path in (run_dir, finished.run_dir)]
        output = run(["diff", "--all", *both], entry=("-m", "tools.checkpoint"))
        assert output.rpartition(" tensors ")[2] == "are equal\n"


def test_going_back_to_a_step(copy_of_finished: Copy, finished) -> None:
    run_dir, arguments = copy_of_finished(40)
    back = [*arguments, "checkpoint.step=20"]
    output = run(back)
    assert "resuming after step 20" in output
    assert output.count("set aside") == 2
    kept = [name for name in names(run_dir) if ".aside-" not in name]
    assert kept == ["step-00000020", "step-00000030", "step-00000040"]
    assert facts(run_dir) == facts(finished.run_dir)
    # A scheduler that starts the same command again goes on, and not back once more.
    output = run(back)
    assert "note: checkpoint.step=20: an earlier start went there, and this one goes on" in output
    assert "is finished: step 40 of 40" in output


@pytest.mark.parametrize("wanted", [30, 25])
def test_a_step_that_is_damaged_or_missing(copy_of_finished: Copy, wanted: int) -> None:
    run_dir, arguments = copy_of_finished(30)
    shard = run_dir / "checkpoints" / "step-00000030" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    before = contents(run_dir / "checkpoints")
    output = run([*arguments, f"checkpoint.step={wanted}"], code=6)
    assert f"step-000000{wanted} is damaged or missing" in output
    assert contents(run_dir / "checkpoints") == before


def test_a_step_that_no_run_has(settings: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    output = run([*settings, f"run_dir={run_dir}", "checkpoint.step=20"], code=6)
    assert f"checkpoint.step=20, but there is none in {run_dir / 'checkpoints'}" in output


def test_junk_beside_checkpoints(copy_of_finished: Copy, finished) -> None:
    run_dir, arguments = copy_of_finished(20)
    (run_dir / "checkpoints" / "step-00000030").mkdir()
    (run_dir / "checkpoints" / "step-00000030" / "notes.txt").write_text("of others")
    (run_dir / "checkpoints" / "step-40").write_text("a file")
    output = run(arguments)
    assert output.count("is damaged and left out") == 2
    assert "resuming after step 20" in output
    assert facts(run_dir) == facts(finished.run_dir)
    [aside] = (run_dir / "checkpoints").glob("step-00000030.aside-*")
    assert (aside / "notes.txt").read_text() == "of others"
