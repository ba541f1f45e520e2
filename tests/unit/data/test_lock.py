import errno
import fcntl
import time
from pathlib import Path

import pytest
from tiny_corpora import prepare

from hysparse_megatron.data import lock
from hysparse_megatron.data.lock import locked
from hysparse_megatron.errors import DataError


def test_a_holder_that_never_ends_is_named_within_the_timeout(tmp_path: Path) -> None:
    path, notes = tmp_path / "data.lock", list[str]()
    with path.open("w") as stream:
        stream.write("node-1 process 42")
        stream.flush()
        fcntl.flock(stream, fcntl.LOCK_EX)
        with (
            pytest.raises(
                DataError, match="still held by node-1 process 42, who has made no progress for 0 s"
            ),
            locked(str(path), 0.2, notes.append),
        ):
            pass
    assert notes == ["waiting for node-1 process 42 to prepare the same data"]
    with locked(str(path), 0.2, notes.append) as is_locked:
        assert is_locked


def test_a_holder_that_makes_progress_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "data.lock"
    states = iter([*range(12), *[12] * 1000])  # a second, and then it stands still
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        began = time.monotonic()
        with (
            pytest.raises(DataError, match="no progress for 0 s"),
            locked(str(path), 0.15, lambda line: None, lambda: next(states)),
        ):
            pass
    assert time.monotonic() - began > 1.0
    assert next(states) == 12


def test_a_file_system_without_locks_is_noted_and_works(
    tmp_path: Path, shared_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is first with the same data, both have them."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    notes: list[str] = []
    inner = []

    def note(line: str) -> None:
        notes.append(line)
        if line.startswith("assembling") and not inner:
            inner.append(None)
            inner[0] = prepare(shared_source, tmp_path)

    assert prepare(shared_source, tmp_path, progress=note) == inner[0]
    assert "no locks" in notes[0]
    assert len(list(tmp_path.iterdir())) == 2
