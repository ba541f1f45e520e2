"""How runs that cannot go on end: exit code, message, and nothing overwritten."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from run_commands import (
    LOCAL,
    TINY,
    Copy,
    children_seconds,
    contents,
    facts,
    read_json,
    run,
)

from hysparse_megatron.data.tokenizer import bytes_tokenizer

pytestmark = pytest.mark.thorough

QUICK_SECONDS = 5.0


@pytest.mark.parametrize("entry", ["hysparse_megatron", "launch.local"])
def test_all_mistakes_at_once_before_anything_heavy(entry: str, tmp_path: Path) -> None:
    obstacle = tmp_path / "file"
    obstacle.write_text("x")
    started = children_seconds()
    output = run(
        [
            "train.steps=-1",
            "model.layout=F 3*X",
            "model.num_attention_heads=6",
            "model.num_query_groups=4",
            "optim.beta1=2.0",
            "data.path=/nowhere/at/all",
            f"run_dir={obstacle}/below/run",
        ],
        entry=("-m", entry),
        afresh=True,
        PYTHONPROFILEIMPORTTIME="1",
        code=2,
    )
    assert children_seconds() - started < QUICK_SECONDS
    for expected in (
        "train.steps:",
        "unknown layer 'X'",
        "model.num_attention_heads:",
        "optim.beta1:",
        "data.path:",
        "run_dir:",
        "6 problems in the configuration",
        "got",
        "allowed",
    ):
        assert expected in output
    assert "Traceback" not in output
    imported = {
        line.rpartition("|")[2].strip()
        for line in output.splitlines()
        if line.startswith("import time:")
    }
    assert "hydra" in imported
    assert "torch" not in imported


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.stepz=3", "model=no_such"], "train.stepz"),
        (["data.path=/nowhere/at/all"], "data.path: got /nowhere/at/all"),
        (["checkpoint.load=/nowhere/at/all"], "checkpoint.load: got /nowhere/at/all"),
        (["parallel.tp=2"], "the world size, which is 1"),
        (["--config", "/nowhere/config.yaml"], "/nowhere/config.yaml"),
        (["--stepz"], "--stepz"),
    ],
)
def test_bad_settings(arguments: list[str], message: str, tmp_path: Path) -> None:
    started = children_seconds()
    output = run(arguments, cwd=tmp_path, afresh=True, code=2)
    assert children_seconds() - started < QUICK_SECONDS
    assert message in output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == [], "nothing was created"


def test_a_run_directory_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    output = run([f"run_dir={tmp_path}/file/run"], code=2)
    assert f"{tmp_path}/file is not a directory" in output
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("world_size", "message"), [("3", "the world size, which is 3"), ("x", "no number")]
)
def test_a_wrong_world_size(world_size: str, message: str) -> None:
    rank = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    output = run(["parallel.tp=2"], WORLD_SIZE=world_size, **rank, code=2)
    assert message in output


def test_the_launcher_counts_ranks_itself() -> None:
    for three in (["--nproc", "3"], ["--nproc=3"], ["--nproc-per-node=3"], ["--nproc_per_node=3"]):
        output = run([*three, "parallel=tp2_pp2"], entry=LOCAL, code=2)
        assert "the world size, which is 3" in output
    for wrong in (["--nproc"], ["--nproc", "two"], ["--nproc", "0"], ["--nprocs=2"]):
        output = run(wrong, entry=LOCAL, code=2)
        assert "--nproc" in output


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_incomplete_launcher_is_told_on_any_rank(rank: str) -> None:
    output = run([], RANK=rank, code=2)
    assert "WORLD_SIZE, LOCAL_RANK not set" in output


def test_a_locked_run_directory(copy_of_finished: Copy) -> None:
    run_dir, arguments = copy_of_finished(20)
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 1 on somewhere")
        lock.flush()
        before = contents(run_dir)
        output = run(arguments, code=2)
        assert f"{run_dir} is locked by process 1 on somewhere" in output
        assert contents(run_dir) == before


def test_resume_refused_over_existing_checkpoints(copy_of_finished: Copy) -> None:
    run_dir, arguments = copy_of_finished(20)
    before = contents(run_dir / "checkpoints")
    config = (run_dir / "config.yaml").read_text()
    output = run([*arguments, "checkpoint.resume=false"], code=2)
    assert "checkpoint.resume=false would write over" in output
    assert contents(run_dir / "checkpoints") == before
    # A start that is refused is no start: the run stays described by what it ran with.
    assert (run_dir / "config.yaml").read_text().splitlines()[2:] == config.splitlines()[2:]


def flip_a_byte(checkpoint: Path) -> None:
    shard = next(checkpoint.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def truncate(checkpoint: Path) -> None:
    shard = next(checkpoint.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [truncate, flip_a_byte])
def test_only_damaged_checkpoints(copy_of_finished: Copy, damage: Callable) -> None:
    run_dir, arguments = copy_of_finished(20)
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    damage(checkpoint)
    before = contents(run_dir / "checkpoints")
    metrics = (run_dir / "metrics.jsonl").read_bytes()
    output = run(arguments, code=6)
    assert str(checkpoint) in output
    assert contents(run_dir / "checkpoints") == before
    assert (run_dir / "metrics.jsonl").read_bytes() == metrics
    status = read_json(run_dir / "status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 6)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    copy_of_finished: Copy, finished
) -> None:
    run_dir, arguments = copy_of_finished(30)
    flip_a_byte(run_dir / "checkpoints" / "step-00000030")
    output = run(arguments)
    assert "step-00000030" in output.split("resuming after step")[0], "a warning names it"
    assert "resuming after step 20" in output
    assert facts(run_dir) == facts(finished.run_dir)


def test_a_vocabulary_smaller_than_the_tokenizers(corpus: list[str], tmp_path: Path) -> None:
    command = [*TINY, *corpus, "train.steps=8", f"run_dir={tmp_path / 'run'}"]
    output = run([*command, "model.vocab_size=299"], code=5)
    assert "model.vocab_size is 299" in output
    assert "ids up to 299 of the tokenizer" in output


@pytest.mark.parametrize("prompt", ["", "a" * 70])
def test_a_prompt_that_cannot_be_continued(prompt: str, corpus: list[str], tmp_path: Path) -> None:
    given = ["tracking.sample_tokens=3", f"tracking.sample_prompt='{prompt}'"]
    of_bytes = ["data.tokenizer_vocab_size=257", "train.steps=8", f"run_dir={tmp_path / 'run'}"]
    output = run([*TINY, *corpus, *of_bytes, *given], code=2)
    assert f"tracking.sample_prompt has {len(prompt)} tokens: give 1 to 63" in output


def test_a_tokenizer_with_an_id_more_than_the_model_has_rows(
    corpus: list[str], tmp_path: Path
) -> None:
    """As an added token that no text has: common in published folders."""
    path = tmp_path / "tokenizer.json"
    tokenizer = bytes_tokenizer()
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save(str(path))
    run_dir = tmp_path / "run"
    command = [*TINY, *corpus, "train.steps=8", f"run_dir={run_dir}", f"data.tokenizer={path}"]
    output = run([*command, "model.vocab_size=257"])
    assert "documents end with <|endoftext|> (id 256)" in output
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(b"\xef\xbb\xbfalpha\n")  # a mark that editors write is no text
    options = ["--run-dir", str(run_dir), "--prompts-file", str(prompts), "--max-new-tokens=3"]
    output = run(options, entry=("-m", "tools.generate"))
    assert "\ufeff" not in output


def test_weights_that_are_not_there(corpus: list[str], tmp_path: Path) -> None:
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "notes.txt").write_text("no checkpoint")
    command = [*TINY, *corpus, "train.steps=8", f"run_dir={tmp_path / 'run'}"]
    output = run([*command, f"checkpoint.load={tmp_path / 'junk'}"], code=6)
    assert f"no valid checkpoint at {tmp_path / 'junk'}" in output


def test_weights_of_another_model(finished, settings: list[str], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(finished.run_dir, source)
    other = [*settings, "model.hidden_size=40", f"run_dir={tmp_path / 'run'}"]
    output = run([*other, f"checkpoint.load={source}"], code=2)
    assert "model.hidden_size: the checkpoint has 32, asked for 40" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("entry", ["hysparse_megatron", "launch.local"])
def test_another_model_in_the_directory_of_a_run(copy_of_finished: Copy, entry: str) -> None:
    run_dir, arguments = copy_of_finished(40)
    before = contents(run_dir)
    other = ["model.hidden_size=40", "model.layout=F F S", "optim.name=muon"]
    output = run([*arguments, *other], entry=("-m", entry), code=2)
    for expected in (
        "step-00000040, which this run would go on from, was made with other settings:",
        "model.hidden_size: the checkpoint has 32, asked for 40",
        "model.layout: the checkpoint has FSF, asked for FFS",
        "optim.name: the checkpoint has adamw, asked for muon",
    ):
        assert expected in output
    assert "Traceback" not in output
    assert contents(run_dir) == before


SMALL_FILES_ONLY = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
os.execv(sys.executable, [sys.executable, "-m", "hysparse_megatron", *sys.argv[1:]])
"""


def test_a_full_disk_during_a_save(copy_of_finished: Copy) -> None:
    """Files cannot grow beyond 200 kB; a shard is larger."""
    run_dir, arguments = copy_of_finished(20)
    before = contents(run_dir / "checkpoints")
    output = run(arguments, entry=("-c", SMALL_FILES_ONLY), code=6)
    assert "step-00000030 was not written" in output
    assert "Traceback" not in output.partition("CheckpointError:")[0]
    assert contents(run_dir / "checkpoints") == before, "the old one is whole, no new one is left"
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000020"]
    assert read_json(run_dir / "status.json")["exit_code"] == 6
