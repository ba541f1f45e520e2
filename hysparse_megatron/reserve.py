"""Room on the disk for the last words of a run that fills it."""

from __future__ import annotations

import contextlib
import errno
import secrets
from collections.abc import Callable
from pathlib import Path

RESERVE_FILE = ".reserve"
"""In the run directory."""

RESERVE_BYTES = 1 << 16
"""Enough for dozens of rows, and for `status.json`."""

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Reserve:
    """A file that holds room, and is deleted when a write finds none left."""

    def __init__(self, run_path: Path) -> None:
        """Take the room. Raises OSError if there is none."""
        self._path = run_path / RESERVE_FILE
        self.failure: OSError | None = None
        """Why the run must stop: a write found no room, or failed again after a second try."""
        if not self._path.exists() or self._path.stat().st_size < RESERVE_BYTES:
            self._path.unlink(missing_ok=True)
            with self._path.open("xb") as file:  # not zeros, which some file systems do not store
                file.write(secrets.token_bytes(RESERVE_BYTES))

    def attempt(self, write: Callable[[], None], again: Callable[[], None] | None = None) -> None:
        """Call `write`; if it fails, call it, or `again`, once more, on a full disk with the room.

        Raises what the second one raises.
        """
        try:
            write()
        except OSError as error:
            if error.errno in _FULL:
                self.failure = self.failure or error
                self.give_up()
            try:
                (again or write)()
            except OSError as second:
                self.failure = self.failure or second
                raise

    def give_up(self) -> None:
        """Delete the file."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
