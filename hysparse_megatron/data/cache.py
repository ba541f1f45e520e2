"""Folders that several processes may ask for and one builds.

A folder is built beside its final place and renamed when complete, so nobody ever sees half of one.
A file lock makes the others wait for the builder; the kernel releases it when its holder dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hysparse_megatron.errors import DataError
from hysparse_megatron.files import sync_folder

LOCK_TIMEOUT_SECONDS = 3600.0
"""Longest wait for another process that builds the same folder."""

_POLL_SECONDS = 0.1
_NOTE_EVERY_SECONDS = 30.0
# What file systems without locks answer. Building twice is then possible, and harmless.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def build_once[Loaded](
    directory: str,
    *,
    load: Callable[[str], Loaded],
    build: Callable[[str], None],
    note: Callable[[str], None],
    lock_timeout_seconds: float = LOCK_TIMEOUT_SECONDS,
) -> Loaded:
    """Load a folder, building it first if it is missing or damaged.

    Args:
        directory: the final place; its parent is created.
        load: reads and checks the folder; raises DataError if it is not valid.
        build: fills an empty folder. If it raises, what it wrote is removed.
        note: told in one line why something takes time.
        lock_timeout_seconds: longest wait for another process.

    Raises:
        DataError: the place cannot be written (names the path), another process holds the lock for
            too long, or what was built is not valid.
    """
    if os.path.isdir(directory):
        try:
            return load(directory)
        except DataError:
            pass  # looked at again below, when nobody else can be replacing it
    try:
        os.makedirs(os.path.dirname(directory), exist_ok=True)
        with locked(f"{directory}.lock", lock_timeout_seconds, note) as is_locked:
            if os.path.isdir(directory):
                try:
                    return load(directory)
                except DataError as error:
                    note(f"rebuilding damaged {directory}: {error}")
            if is_locked:
                _remove_leftovers(directory)
            _build_and_publish(directory, build)
    except OSError as error:
        place = error.filename or directory
        raise DataError(f"{place}: cannot write prepared data: {error.strerror}") from error
    return load(directory)


def _build_and_publish(directory: str, build: Callable[[str], None]) -> None:
    temporary = f"{directory}.tmp-{uuid.uuid4().hex[:12]}"
    os.mkdir(temporary)
    try:
        build(temporary)
        sync_folder(temporary)
        if os.path.isdir(directory):
            damaged = f"{directory}.old-{uuid.uuid4().hex[:12]}"
            os.rename(directory, damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        try:
            os.rename(temporary, directory)
        except OSError as error:
            # Without a lock another process may have been first; `load` judges what it built.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync_folder(os.path.dirname(directory))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(directory: str) -> None:
    """Remove what a killed builder left; only while holding the lock."""
    parent, name = os.path.split(directory)
    for entry in os.listdir(parent):
        if entry.startswith((f"{name}.tmp-", f"{name}.old-")):
            shutil.rmtree(os.path.join(parent, entry), ignore_errors=True)


@contextmanager
def locked(path: str, timeout_seconds: float, note: Callable[[str], None]) -> Iterator[bool]:
    """Hold an exclusive lock on a file; yields False on a file system that has none.

    The lock file stays: removing it would let two processes lock two files of one name.

    Raises:
        DataError: another process holds it for longer than the timeout (names the holder).
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _acquire(descriptor, path, timeout_seconds, note)
    finally:
        os.close(descriptor)


def _acquire(
    descriptor: int, path: str, timeout_seconds: float, note: Callable[[str], None]
) -> bool:
    start = time.monotonic()
    next_note = start
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                note(f"{path}: this file system has no locks; going on without")
                return False
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
        else:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.uname().nodename} process {os.getpid()}".encode(), 0)
            return True
        now = time.monotonic()
        holder = os.pread(descriptor, 256, 0).decode(errors="replace") or "another process"
        if now - start > timeout_seconds:
            raise DataError(
                f"{path}: still held by {holder} after {timeout_seconds:.0f} s; is it stopped?"
            )
        if now >= next_note:
            note(f"waiting for {holder} to prepare the same data")
            next_note = now + _NOTE_EVERY_SECONDS
        time.sleep(_POLL_SECONDS)
