"""What several parts of a run do with files alike."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from hysparse_megatron.errors import ConfigError, DataError, OutputError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems without locks answer to `flock`, such as Lustre mounted without."""

_TEMPORARY = ".tmp"
_NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems answer that write the names in folders by themselves, or cannot be told to."""


def require_writable(path: Path | None, option: str) -> None:
    """Find out before minutes of work that a file asked for cannot be written.

    Raises ConfigError, which names the command line's `option`.
    """
    if path is None:
        return
    try:
        is_new = not os.path.lexists(path)
        path.open("a").close()
        if is_new:  # what was asked for may fail: an empty file would pass for its result
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{option}: cannot write {path} ({error.strerror})") from error


@contextlib.contextmanager
def writing(path: Path | None, option: str) -> Iterator[None]:
    """Turn an OSError into an OutputError that names the command line's `option` for the place."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{option}: cannot write {path} ({error.strerror or error})") from error


def write_whole(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a file so that a reader sees the old or the new content, never a part.

    It is written under a fresh name beside its place, so that nothing else is ever written over,
    also not through a link. `durable`: whole after a loss of power, too.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: str | os.PathLike[str], problem: str = "cannot be read") -> Iterator[None]:
    """Turn an OSError into a DataError that names the file and the problem."""
    try:
        yield
    except OSError as error:
        place, reason = error.filename or path, error.strerror or error
        raise DataError(f"{place}: {problem}: {reason}") from error


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a whole file, in hexadecimal digits. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_lines(path: Path) -> IO[str]:
    """Open a file of lines to append to; each is handed to the system as soon as it is written.

    A last line that was cut short, as by a kill or a full disk, must not swallow the next.
    """
    file = path.open("a", buffering=1, encoding="utf-8")
    with path.open("rb") as before:
        size = before.seek(0, os.SEEK_END)
        before.seek(max(0, size - 1))
        if before.read(1) not in (b"", b"\n"):
            file.write("\n")
    return file


def remove_temporaries(directory: Path) -> None:
    """Delete what `write_whole` left where it was killed. Only for the owner of the directory."""
    for path in directory.glob(f".*{_TEMPORARY}"):
        with contextlib.suppress(OSError):
            path.unlink()


def sync_folder(directory: str | os.PathLike[str]) -> None:
    """Make the names in a folder survive a loss of power, where the file system can be told to."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)
