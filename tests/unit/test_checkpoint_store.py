"""Checkpoint directories: written whole, judged by their manifest, pruned."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from hysparse_megatron.checkpoint import choice, writer
from hysparse_megatron.checkpoint.manifest import LARGEST_BYTES
from hysparse_megatron.checkpoint.store import (
    latest_checkpoint,
    meant,
    problems_of,
    read_manifest,
    remove_leftovers,
    resolve,
    set_aside,
    step_directory,
)
from hysparse_megatron.errors import CheckpointError
from tests.checkpoints import flip_a_byte, write_checkpoint, write_texts

pytestmark = pytest.mark.usefixtures("group")


def test_a_checkpoint_and_its_manifest(tmp_path: Path) -> None:
    directory = write_texts(tmp_path, 7)
    assert directory == step_directory(tmp_path, 7) == tmp_path / "step-00000007"
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert manifest["tokens"] == 70
    assert manifest["files"].keys() == {"__0_0.distcp", "common/metadata.json", "tensors.json"}
    assert manifest["files"]["__0_0.distcp"]["bytes"] == 7
    assert len(manifest["files"]["__0_0.distcp"]["sha256"]) == 64
    assert problems_of(directory) == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def test_the_newest_counts_by_step(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) == (None, [])
    for step in (9, 1000, 200):
        write_texts(tmp_path, step)
    assert latest_checkpoint(tmp_path) == (step_directory(tmp_path, 1000), [])


def test_what_a_killed_run_leaves_is_ignored_and_removed(tmp_path: Path) -> None:
    write_texts(tmp_path, 4)
    for step in (8, 12):
        killed = tmp_path / f"step-{step:08d}.tmp-0a1b2c"
        killed.mkdir()
        (killed / "junk").write_text("x")
    assert latest_checkpoint(tmp_path) == (step_directory(tmp_path, 4), [])
    write_texts(tmp_path, 8)
    assert latest_checkpoint(tmp_path) == (step_directory(tmp_path, 8), [])
    assert not (step_directory(tmp_path, 8) / "junk").exists()
    remove_leftovers(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000004", "step-00000008"]
    remove_leftovers(tmp_path / "nowhere")


def digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_of(content: str) -> Callable[[Path], None]:
    return lambda directory: (directory / "manifest.json").write_text(content) and None


def edited(keep_hash: bool = False, **changes: Any) -> Callable[[Path], None]:
    """A manifest with other values, by default as one of an early version, without a hash."""

    def edit(directory: Path) -> None:
        path = directory / "manifest.json"
        content = {**json.loads(path.read_text()), **changes}
        if not keep_hash:
            del content["manifest_sha256"]
        path.write_text(json.dumps(content))

    return edit


def with_file(name: str) -> Callable[[Path], None]:
    """A manifest that names a file which is there, is right, and is none of the checkpoint."""

    def edit(directory: Path) -> None:
        (directory.parent / "elsewhere").write_text("weights")
        files = read_manifest(directory)["files"]
        named = name.format(parent=directory.parent)
        edited(files={**files, named: files["__0_0.distcp"]})(directory)

    return edit


def link_elsewhere(directory: Path) -> None:
    shard = directory / "__0_0.distcp"
    shard.rename(directory.parent / "elsewhere")
    shard.symlink_to(directory.parent / "elsewhere")


def make_a_pipe(directory: Path) -> None:
    (directory / "manifest.json").unlink()
    os.mkfifo(directory / "manifest.json")


SHARD = {"__0_0.distcp": {"bytes": 7, "sha256": digest_of_text("weights")}}

DAMAGE: dict[str, Callable[[Path], None]] = {
    "one value edited": edited(keep_hash=True, tokens=81),
    "another step": edited(step=1_000_000_000),
    "a negative step": edited(step=-8),
    "a step that is text": edited(step="8"),
    "a step that is a fraction": edited(step=8.0),
    "a step that is true": edited(step=True),
    "no files": edited(files={}),
    "no file of tensors": edited(files={"tensors.json": SHARD["__0_0.distcp"]}),
    "nothing that describes the tensors": edited(files=SHARD),
    "negative sizes": edited(files={"__0_0.distcp": {**SHARD["__0_0.distcp"], "bytes": -7}}),
    "no hashes": edited(files={"__0_0.distcp": {"bytes": 7, "sha256": None}}),
    "files that are text": edited(files="all"),
    "data that are a list": edited(data=[]),
    "tokens that are text": edited(tokens="80"),
    "a model that is text": edited(model="large"),
    "progress that is a number": edited(progress=3),
    "a position that is text": edited(progress={"position": {"samples": "4"}}),
    "a guard that is a number": edited(progress={"guard": 3}),
    "losses that are text": edited(progress={"guard": {"losses": ["1"]}}),
    "a file above": with_file("../elsewhere"),
    "a file above, by a detour": with_file("common/../../elsewhere"),
    "an absolute path": with_file("{parent}/elsewhere"),
    "a name that no file can have": with_file("x" * 300),
    "a link to elsewhere": link_elsewhere,
    "a pipe in place of the manifest": make_a_pipe,
    "a huge manifest": manifest_of(" " * (LARGEST_BYTES + 1)),
    "a deep manifest": manifest_of('{"step": ' + "[" * 100_000),
    "truncated shard": lambda directory: (directory / "__0_0.distcp").write_text("weight"),
    "missing shard": lambda directory: (directory / "__0_0.distcp").unlink(),
    "flipped byte": flip_a_byte,
    "missing manifest": lambda directory: (directory / "manifest.json").unlink(),
    "empty manifest": manifest_of(""),
    "half a manifest": manifest_of('{"files": {'),
    "bytes that are no text": lambda directory: (directory / "manifest.json").write_bytes(b"\xff"),
    "a manifest that is a list": manifest_of("[]"),
    "files that are a list": manifest_of('{"step": 8, "files": []}'),
    "files without sizes": manifest_of('{"step": 8, "files": {"__0_0.distcp": {}}}'),
    "a manifest without step": manifest_of('{"files": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_and_the_one_before_is_taken(tmp_path: Path, damage: str) -> None:
    older, newer = write_texts(tmp_path, 4), write_texts(tmp_path, 8)
    DAMAGE[damage](newer)
    assert problems_of(newer), damage
    found, rejected = latest_checkpoint(tmp_path)
    assert found == older
    assert rejected == problems_of(newer)
    assert str(newer) in rejected[0]
    with pytest.raises(CheckpointError):
        resolve(newer)


def test_a_renamed_checkpoint_is_named_and_the_one_before_is_taken(tmp_path: Path) -> None:
    older, newer = write_texts(tmp_path, 4), write_texts(tmp_path, 8)
    renamed = newer.rename(step_directory(tmp_path, 99))
    found, [problem] = latest_checkpoint(tmp_path)
    assert found == older
    assert f"{renamed}/manifest.json: it is of step 8, but its directory is named" in problem
    assert problems_of(renamed.rename(tmp_path / "best")) == [], "no step is told by that name"


def test_a_manifest_of_an_early_version_has_no_hash_of_its_own(tmp_path: Path) -> None:
    directory = write_texts(tmp_path, 4)
    edited()(directory)
    assert "manifest_sha256" not in read_manifest(directory)
    assert latest_checkpoint(tmp_path) == (directory, [])


def test_what_a_manifest_says_is_hashed_as_it_is_read(tmp_path: Path) -> None:
    facts = {"progress": {10: 1e-300, 9: float("nan"), "x": (1, None)}, "text": "é"}
    directory = write_checkpoint(tmp_path, 4, lambda path: (path / "__0_0.distcp").touch(), facts)
    assert read_manifest(directory)["progress"].keys() == {"9", "10", "x"}


def test_only_damaged_ones_are_no_fresh_start(tmp_path: Path) -> None:
    for step in (4, 8):
        (write_texts(tmp_path, step) / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000008.*step-00000004") as caught:
        latest_checkpoint(tmp_path)
    assert caught.value.exit_code == 6


def test_what_a_user_may_name(tmp_path: Path) -> None:
    write_texts(tmp_path / "run" / "checkpoints", 4)
    newest = write_texts(tmp_path / "run" / "checkpoints", 8)
    assert resolve(tmp_path / "run") == newest
    assert resolve(newest) == newest
    for wrong in (tmp_path, tmp_path / "nowhere", newest / "common"):
        with pytest.raises(CheckpointError, match="no valid checkpoint at"):
            resolve(wrong)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        # What torch raises on every rank when one could not write: not even an Exception.
        CheckpointException("write", {0: _wrap_exception(OSError(28, "No space left on device"))}),
    ],
)
def test_a_failed_write_leaves_nothing_and_keeps_the_old(
    tmp_path: Path, error: BaseException
) -> None:
    write_texts(tmp_path, 4)

    def fail(directory: Path) -> None:
        (directory / "__0_0.distcp").write_text("half")
        raise error

    with pytest.raises(CheckpointError, match=r"step-00000008 was not written; rank 0: ") as caught:
        write_checkpoint(tmp_path, 8, fail, {})
    assert "No space" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    assert latest_checkpoint(tmp_path) == (step_directory(tmp_path, 4), [])


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(CheckpointError, match="checkpoints"):
        write_texts(tmp_path / "checkpoints", 1)


def test_a_file_system_that_cannot_sync_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some answer that they cannot; what a disk answers that fails is an error."""
    fsync, failure = os.fsync, [errno.EINVAL]

    def fail_for_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(failure[0], os.strerror(failure[0]))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    assert problems_of(write_texts(tmp_path, 4)) == []
    failure[0] = errno.EIO
    with pytest.raises(CheckpointError, match=r"step-00000008 was not written; rank 0: .*Input"):
        write_texts(tmp_path, 8)


def test_an_existing_checkpoint_is_never_written_into(tmp_path: Path) -> None:
    before = (write_texts(tmp_path, 4) / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match="step-00000004 exists already"):
        write_texts(tmp_path, 4, "others")
    assert (step_directory(tmp_path, 4) / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("junk", ["file", "folder"])
def test_junk_where_a_checkpoint_belongs(tmp_path: Path, junk: str) -> None:
    place = step_directory(tmp_path, 8)
    place.write_text("x") if junk == "file" else (place / "of" / "others").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="step-00000008 exists already"):
        write_texts(tmp_path, 8)
    # A run that starts over junk alone must not pass for one without checkpoints.
    with pytest.raises(CheckpointError, match="no checkpoint is valid"):
        latest_checkpoint(tmp_path)
    older = write_texts(tmp_path, 4)
    assert latest_checkpoint(tmp_path)[0] == older
    [aside] = set_aside(tmp_path, 4)
    assert aside.name.startswith("step-00000008.aside-")
    assert latest_checkpoint(tmp_path) == (older, [])
    write_texts(tmp_path, 8)
    assert aside.exists()


def test_a_disk_that_is_full_at_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path, 4)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_manifest", full)
    with pytest.raises(CheckpointError, match=r"step-00000008 was not written; rank 0: .*No space"):
        write_texts(tmp_path, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_an_unread_hash_lets_a_flipped_byte_pass(tmp_path: Path) -> None:
    """What checkpoint.verify=false means; a size is always looked at."""
    older, newer = write_texts(tmp_path, 4), write_texts(tmp_path, 8)
    flip_a_byte(newer)
    assert choice.latest(tmp_path, content=True)[0] == older
    assert choice.latest(tmp_path, content=False) == (newer, [])
    (newer / "__0_0.distcp").write_text("weight")
    assert choice.latest(tmp_path, content=False)[0] == older


def test_a_step_that_was_asked_for_has_no_substitute(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    older, newer = write_texts(checkpoints, 4), write_texts(checkpoints, 8)
    assert choice.resolve(tmp_path, 4, content=True) == older
    assert choice.resolve(tmp_path, 4, content=True) == older
    assert choice.resolve(tmp_path, None, content=True) == newer
    assert choice.resolve(older, None, content=True) == older
    flip_a_byte(newer)
    assert choice.resolve(tmp_path, None, content=True) == older
    for ask in (
        lambda: choice.resolve(tmp_path, 8, content=True),
        lambda: choice.resolve(tmp_path, 8, content=True),
        lambda: choice.resolve(newer, None, content=True),
        lambda: choice.resolve(tmp_path, 5, content=True),
    ):
        with pytest.raises(CheckpointError, match=r"step-0000000[58]") as caught:
            ask()
        assert caught.value.exit_code == 6


def test_a_checkpoint_is_meant_by_step_or_path() -> None:
    run = Path("runs/x")
    assert meant(run, "newest") == (run, None)
    assert meant(run, "12") == (run, 12)
    assert meant(run, "\u00b2") == (Path("\u00b2"), None), "a digit that is no number"
