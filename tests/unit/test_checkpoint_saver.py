"""Saves beside training: when they start, complete, wait for each other, and fail."""

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hysparse_megatron.checkpoint import saver as saver_module
from hysparse_megatron.checkpoint.saver import Saver
from hysparse_megatron.checkpoint.store import (
    is_proven,
    problems_of,
    published,
    read_manifest,
    step_directory,
)
from hysparse_megatron.checkpoint.writer import Job
from hysparse_megatron.config.compose import compose
from hysparse_megatron.errors import CheckpointError, NumericalStop
from tests.unit.single_process import DEVICE

pytestmark = pytest.mark.usefixtures("group")


class Disk:
    """Stands for model and optimizer: writes one small file when it may."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.may_write = threading.Event()
        self.copied: list[int] = []
        self.error: Exception | None = None
        self.rank_not_finite: int | None = None

    def start(self, state: Any, step: int, directory: Path) -> Job:
        self.copied.append(step)

        def write() -> None:
            assert self.may_write.wait(30)
            if self.error is not None:
                raise self.error
            (directory / "__0_0.distcp").write_text(f"weights {step}")

        return Job(write, lambda: (directory / "tensors.json").write_text("{}") and None)

    def make_saver(self, **settings: Any) -> tuple[Saver, list[str]]:
        """A saver into the folder, and what it has said."""
        config = compose([])
        config = replace(config, checkpoint=replace(config.checkpoint, **settings))
        said: list[str] = []
        state: Any = SimpleNamespace(config=config, device=DEVICE)

        def facts(step: int, progress: dict[str, Any]) -> dict[str, Any]:
            return {"tokens": 2 * step, "progress": progress}

        loaded = next(iter(published(self.folder)), None)
        return Saver(state, self.folder, facts, said.append, loaded=loaded), said


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk(tmp_path)
    monkeypatch.setattr(saver_module, "start_save", disk.start)
    monkeypatch.setattr(saver_module, "rank_not_finite", lambda state: disk.rank_not_finite)
    return disk


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def poll_until_done(saver: Saver) -> None:
    for _ in range(3000):
        if not saver.is_busy:
            return
        saver.poll()
        threading.Event().wait(0.01)
    raise AssertionError("not done")


def test_training_goes_on_while_files_are_written(disk: Disk, tmp_path: Path) -> None:
    saver, said = disk.make_saver()
    saver.save(4, {})
    for _ in range(3):
        saver.poll()
    assert saver.is_busy
    [unfinished] = names(tmp_path)
    assert unfinished.startswith("step-00000004.tmp-")
    assert said == []
    disk.may_write.set()
    poll_until_done(saver)
    saver.finish()
    assert names(tmp_path) == ["step-00000004"]
    directory = step_directory(tmp_path, 4)
    assert problems_of(directory) == []
    assert read_manifest(directory)["tokens"] == 8
    assert read_manifest(directory)["files"].keys() == {"__0_0.distcp", "tensors.json"}
    assert said[0].startswith(f"saved {directory}")


def test_without_it_a_save_is_over_at_once(disk: Disk, tmp_path: Path) -> None:
    saver, said = disk.make_saver(asynchronous=False)
    disk.may_write.set()
    saver.save(4, {})
    assert not saver.is_busy
    saver.finish()
    assert names(tmp_path) == ["step-00000004"]
    assert len(said) == 1


def test_one_save_a_step(disk: Disk, tmp_path: Path) -> None:
    saver, said = disk.make_saver()
    saver.save(4, {})
    disk.may_write.set()
    saver.save(4, {})  # as a stop signal asks for
    assert not saver.is_busy
    assert disk.copied == [4]
    saver.finish()
    assert names(tmp_path) == ["step-00000004"]
    assert len(said) == 1


def test_a_new_save_waits_for_the_one_before(disk: Disk, tmp_path: Path) -> None:
    saver, _ = disk.make_saver()
    saver.save(4, {})
    threading.Timer(0.3, disk.may_write.set).start()
    saver.save(5, {})
    assert (tmp_path / "step-00000004" / "manifest.json").exists()
    saver.finish()
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_a_failure_comes_out_at_the_next_poll(disk: Disk, tmp_path: Path) -> None:
    saver, _ = disk.make_saver()
    disk.may_write.set()
    saver.save(4, {})
    saver.finish()
    disk.error = OSError(28, "No space left on device")
    saver.save(5, {})
    with pytest.raises(CheckpointError, match=r"step-00000005 was not written; rank 0: .*No space"):
        poll_until_done(saver)
    assert not saver.is_busy, "told once"
    saver.finish()
    assert names(tmp_path) == ["step-00000004"]


def test_a_failure_at_the_end_is_not_lost(disk: Disk, tmp_path: Path) -> None:
    saver, _ = disk.make_saver()
    disk.error = OSError(28, "No space left on device")
    disk.may_write.set()
    saver.save(5, {})
    with pytest.raises(CheckpointError, match="No space"):
        saver.finish()
    assert names(tmp_path) == []


def test_rules_are_applied_after_a_save(disk: Disk, tmp_path: Path) -> None:
    saver, _ = disk.make_saver(keep=2, keep_every=4)
    disk.may_write.set()
    for step in range(1, 8):
        saver.save(step, {})
    saver.finish()
    assert names(tmp_path) == [f"step-0000000{step}" for step in (4, 6, 7)]


def test_what_is_not_finite_is_not_saved(disk: Disk, tmp_path: Path) -> None:
    saver, _ = disk.make_saver(keep=1)
    disk.may_write.set()
    saver.save(4, {})
    saver.saw_good_step()
    disk.rank_not_finite = 3
    with pytest.raises(NumericalStop, match=r"on rank 3 are not finite after step 8") as caught:
        saver.save(8, {})
    assert caught.value.exit_code == 4
    assert saver.set_aside_unproven() is None, "a good step was made with the one of step 4"
    assert names(tmp_path) == ["step-00000004"]
    assert disk.copied == [4]


def test_the_older_one_stays_until_a_good_step_has_followed_the_newer(
    disk: Disk, tmp_path: Path
) -> None:
    saver, _ = disk.make_saver(keep=1)
    disk.may_write.set()
    for step in (4, 8):
        saver.save(step, {})
        saver.finish()
    assert names(tmp_path) == ["step-00000004", "step-00000008"]
    for _ in range(2):
        saver.saw_good_step()
        saver.finish()
    assert names(tmp_path) == ["step-00000008"]
    assert is_proven(step_directory(tmp_path, 8))


def test_a_good_step_during_a_save_counts_for_what_is_saved(disk: Disk, tmp_path: Path) -> None:
    saver, _ = disk.make_saver(keep=1)
    saver.save(4, {})
    saver.saw_good_step()
    disk.may_write.set()
    saver.save(8, {})
    assert is_proven(step_directory(tmp_path, 4))
    saver.saw_good_step()
    saver.finish()
    assert names(tmp_path) == ["step-00000008"]


@pytest.mark.parametrize("restarted", [False, True])
def test_after_a_numerical_stop_the_start_is_from_one_that_a_good_step_followed(
    restarted: bool, disk: Disk, tmp_path: Path
) -> None:
    saver, said = disk.make_saver()
    disk.may_write.set()
    saver.save(4, {})
    saver.saw_good_step()
    saver.save(8, {})
    if restarted:  # killed before it was known that nothing good comes of step 8
        saver.finish()
        saver, said = disk.make_saver()
    assert saver.set_aside_unproven() == step_directory(tmp_path, 4)
    older, aside = names(tmp_path)
    assert (older, aside.partition("-aside")[0][:20]) == ("step-00000004", "step-00000008.aside-")
    assert "no good step was made after it" in said[-2]
    assert "goes on from" in said[-1]
    again, _ = disk.make_saver()
    assert again.set_aside_unproven() is None, "what is proven stays also if it fails this time"
    assert names(tmp_path) == [older, aside]


def test_the_only_checkpoint_is_not_set_aside(disk: Disk, tmp_path: Path) -> None:
    saver, _ = disk.make_saver()
    assert saver.set_aside_unproven() is None
    disk.may_write.set()
    saver.save(4, {})
    assert saver.set_aside_unproven() is None
    assert names(tmp_path) == ["step-00000004"]


def test_a_deletion_that_fails_is_told_and_training_goes_on(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, said = disk.make_saver(keep=1)
    disk.may_write.set()
    saver.save(1, {})
    saver.finish()
    saver.saw_good_step()
    saver.finish()

    def refuse(*arguments: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    # Of the deletion alone: publishing renames too.
    monkeypatch.setattr(saver_module.store, "unfinished_name", refuse)
    saver.save(2, {})
    saver.finish()
    saver.saw_good_step()
    saver.finish()
    [warning] = [line for line in said if line.startswith("WARNING")]
    assert "step-00000001 could not be deleted: [Errno 1] Operation not permitted" in warning
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
