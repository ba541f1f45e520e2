from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from hysparse_megatron.data import cache
from hysparse_megatron.data.cache import build_once
from hysparse_megatron.errors import DataError


def load(directory: str) -> str:
    path = Path(directory) / "done"
    if not path.exists():
        raise DataError(f"{path}: missing")
    return path.read_text()


def build(directory: str) -> None:
    (Path(directory) / "done").write_text("built")


def test_a_holder_that_never_ends_is_named_within_the_timeout(tmp_path: Path) -> None:
    target = tmp_path / "data"
    notes: list[str] = []
    with open(f"{target}.lock", "w") as stream:
        stream.write("node-1 process 42")
        stream.flush()
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="still held by node-1 process 42 after 0 s"):
            build_once(
                str(target), load=load, build=build, note=notes.append, lock_timeout_seconds=0.2
            )
    assert notes == ["waiting for node-1 process 42 to prepare the same data"]
    assert build_once(str(target), load=load, build=build, note=notes.append) == "built"


def test_a_file_system_without_locks_is_noted_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache.fcntl, "flock", refuse)
    target = tmp_path / "data"

    def build_second(directory: str) -> None:
        build(directory)
        target.mkdir()
        (target / "done").write_text("built by the other")

    notes: list[str] = []
    result = build_once(str(target), load=load, build=build_second, note=notes.append)
    assert result in ("built", "built by the other")
    assert "no locks" in notes[0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data", "data.lock"]


def test_a_full_disk_names_the_path_and_leaves_nothing(tmp_path: Path) -> None:
    def fail(directory: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", f"{directory}/train.bin")

    with pytest.raises(DataError, match=r"train\.bin: cannot write .* No space left"):
        build_once(str(tmp_path / "data"), load=load, build=fail, note=print)
    assert [file.name for file in tmp_path.iterdir()] == ["data.lock"]
