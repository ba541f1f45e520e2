"""Which checkpoints are kept."""

from pathlib import Path

import pytest

from hysparse_megatron.checkpoint import store
from hysparse_megatron.checkpoint.store import (
    latest_checkpoint,
    mark_proven,
    problems_of,
    prune,
    read_manifest,
    remove_leftovers,
    step_directory,
    superfluous,
)
from tests.checkpoints import flip_a_byte, write_texts

pytestmark = pytest.mark.usefixtures("group")


def test_pruning_keeps_the_newest_valid_ones(tmp_path: Path) -> None:
    for step in range(1, 6):
        write_texts(tmp_path, step)
    flip = step_directory(tmp_path, 5) / "manifest.json"
    flip.write_text("garbage")
    newest = step_directory(tmp_path, 4)
    assert prune(tmp_path, 0, 0, newest) == ([], [])
    assert len(list(tmp_path.iterdir())) == 5
    doomed = [step_directory(tmp_path, 2), step_directory(tmp_path, 1)]
    assert superfluous(tmp_path, 2, 0, newest) == doomed
    assert len(list(tmp_path.iterdir())) == 5
    assert prune(tmp_path, 2, 0, newest) == (doomed, [])
    # The damaged one is neither counted nor deleted.
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["3", "4", "5"]
    assert read_manifest(newest)["step"] == 4


def test_pruning_leaves_what_a_link_stands_for(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for step in (2, 3):
        mark_proven(write_texts(checkpoints, step))
    elsewhere = write_texts(tmp_path / "elsewhere", 1)
    link = step_directory(checkpoints, 1)
    link.symlink_to(elsewhere)
    deleted, failures = prune(checkpoints, 1, 0, step_directory(checkpoints, 3))
    assert (deleted, failures) == ([step_directory(checkpoints, 2)], [])
    assert problems_of(link) == []
    assert store.published(checkpoints) == [step_directory(checkpoints, 3), link]


def test_pruning_keeps_multiples(tmp_path: Path) -> None:
    for step in range(1, 11):
        mark_proven(write_texts(tmp_path, step))
    prune(tmp_path, 1, 4, step_directory(tmp_path, 10))
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == [4, 8, 10]


@pytest.mark.parametrize("marked", [True, False])
def test_pruning_never_takes_the_newest_that_a_good_step_followed(
    tmp_path: Path, marked: bool
) -> None:
    """Runs of early versions left no marks: the one before the newest passes for it."""
    for step in (1, 2, 3, 4):
        write_texts(tmp_path, step)
    if marked:
        mark_proven(step_directory(tmp_path, 2))
    newest = step_directory(tmp_path, 4)
    prune(tmp_path, 1, 0, newest)
    assert store.published(tmp_path) == [newest, step_directory(tmp_path, 2 if marked else 3)]
    mark_proven(newest)
    prune(tmp_path, 1, 0, newest)
    assert store.published(tmp_path) == [newest]
    assert problems_of(newest) == []


def test_a_newer_one_does_not_count_as_the_newest_valid(tmp_path: Path) -> None:
    """With a flipped byte it is as large as it should be; what was just written must stay."""
    for step in (4, 8, 12):
        mark_proven(write_texts(tmp_path, step))
    flip_a_byte(step_directory(tmp_path, 12))
    assert prune(tmp_path, 1, 0, step_directory(tmp_path, 8))[0] == [step_directory(tmp_path, 4)]
    assert latest_checkpoint(tmp_path)[0] == step_directory(tmp_path, 8)


def test_a_deletion_that_fails_leaves_no_half_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (4, 8):
        mark_proven(write_texts(tmp_path, step))

    def fail(path: Path) -> None:
        (path / "__0_0.distcp").unlink()
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "rmtree", fail)
        deleted, [failure] = prune(tmp_path, 1, 0, step_directory(tmp_path, 8))
    assert deleted == []
    assert "step-00000004 could not be deleted: [Errno 5] Input/output error" in failure
    assert store.published(tmp_path) == [step_directory(tmp_path, 8)]
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]
