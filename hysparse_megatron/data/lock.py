"""A lock of what several processes may ask for and one makes.

The kernel releases it when its holder dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hysparse_megatron.errors import DataError
from hysparse_megatron.files import NO_LOCKS

_POLL_SECONDS = 0.1
_NOTE_EVERY_SECONDS = 30.0


@contextmanager
def locked(
    path: str,
    timeout_seconds: float,
    note: Callable[[str], None],
    state: Callable[[], object] = lambda: None,
) -> Iterator[bool]:
    """Hold an exclusive lock on a file; yields False on a file system that has none.

    The lock file stays: removing it would let two processes lock two files of one name.

    Args:
        path: of the file.
        timeout_seconds: longest wait for a holder that makes no progress.
        note: told for whom it waits.
        state: changes while the holder makes progress.

    Raises:
        DataError: another process holds it for longer than the timeout (names the holder).
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        start = next_note = time.monotonic()
        before = state()
        while (is_locked := _try(descriptor)) is None:
            now = time.monotonic()
            if (found := state()) != before:
                before, start = found, now
            holder = os.pread(descriptor, 256, 0).decode(errors="replace") or "another process"
            if now - start > timeout_seconds:
                raise DataError(
                    f"{path}: still held by {holder}, who has made no progress for "
                    f"{timeout_seconds:.0f} s; is it stopped?"
                )
            if now >= next_note:
                note(f"waiting for {holder} to prepare the same data")
                next_note = now + _NOTE_EVERY_SECONDS
            time.sleep(_POLL_SECONDS)
        if is_locked:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.uname().nodename} process {os.getpid()}".encode(), 0)
        else:
            note(f"{path}: this file system has no locks; going on without")
        yield is_locked
    finally:
        os.close(descriptor)


def _try(descriptor: int) -> bool | None:
    """Whether it is ours now; None if another process holds it, False without locks.

    Building twice is then possible, and harmless.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True
