"""Whether files hold what the card of their folder says: a part of it at once, the rest meanwhile.

Hashing a corpus of terabytes takes hours. So a small file is compared as a whole when it is opened,
of a large one blocks at fixed places; all of it is read beside training, slowly, by a thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping

from hysparse_megatron.errors import DataError

SMALL_BYTES = 16 * 1024 * 1024
"""A file up to this size is hashed as a whole at once: some hundredths of a second."""

NUM_BLOCKS, BLOCK_BYTES = 64, 16 * 1024
"""What is read at once of a larger one; changing either changes the hash in the card."""

BYTES_PER_SECOND = 100_000_000
"""Highest speed of reading beside training: a file system shared by many machines stays free."""

_READ_BYTES = 4 * 1024 * 1024
_LOWEST_PRIORITY = 19


def hash_blocks(path: str) -> str | None:
    """SHA-256 of blocks spread evenly over a file, its end among them; None of a small file.

    Raises OSError.
    """
    size = os.path.getsize(path)
    if size <= SMALL_BYTES:
        return None
    found = hashlib.sha256()
    with open(path, "rb") as stream:
        for number in range(NUM_BLOCKS):
            stream.seek((size - BLOCK_BYTES) * number // (NUM_BLOCKS - 1))
            found.update(stream.read(BLOCK_BYTES))
    return found.hexdigest()


def is_small(path: str) -> bool:
    """Whether the file is compared as a whole at once. Raises OSError."""
    return os.path.getsize(path) <= SMALL_BYTES


class ContentCheck:
    """Compares whole files with their hashes in a thread of low priority.

    Args:
        hashes: SHA-256 by path.
        log: told about what is done, and about what could not be read, in one line each.
        bytes_per_second: to read at most.

    Attributes:
        problem: the first file that differs, once it is known.
    """

    def __init__(
        self,
        hashes: Mapping[str, str],
        log: Callable[[str], None],
        bytes_per_second: float = BYTES_PER_SECOND,
    ) -> None:
        self.problem: DataError | None = None
        self._log = log
        self._bytes_per_second = bytes_per_second
        self._hashes = dict(hashes)
        self.thread = threading.Thread(target=self._run, daemon=True)
        if hashes:
            self.thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # Linux has priorities of threads
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        for path, expected in self._hashes.items():
            try:
                found = self._hash_slowly(path)
            except OSError as error:  # training itself may still be able to read
                self._log(f"WARNING: {path}: its content is not checked: {error.strerror}")
                continue
            if found != expected:
                self.problem = changed(path)
                return
        self._log(f"the content of {len(self._hashes)} large data files is as their cards say")

    def _hash_slowly(self, path: str) -> str:
        found, started, count = hashlib.sha256(), time.monotonic(), 0
        with open(path, "rb") as stream:
            while data := stream.read(_READ_BYTES):
                found.update(data)
                count += len(data)
                early = started + count / self._bytes_per_second - time.monotonic()
                time.sleep(max(0.0, early))
        return found.hexdigest()


def changed(path: str) -> DataError:
    """The error of a file that holds something else than the card says."""
    return DataError(
        f"{path}: contents differ from the hash in its dataset.json: the file changed since it was "
        "prepared; restore it, or prepare it anew"
    )
