"""Standard output that may go away: a closed terminal or a full disk ends no run."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

_READER_IS_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""A pipe that nobody reads any more, as of `head`, and a terminal that was closed."""


class LastingOutput(io.TextIOWrapper):
    """A text stream that leaves out what cannot be written; of a command, only if nobody reads."""

    def __init__(self, stream: io.TextIOWrapper, whatever: bool) -> None:
        """Take the place of `stream`. `whatever`: also a full disk, as a run has other records."""
        facts: dict[str, Any] = {
            "encoding": stream.encoding,
            # A terminal may not know every character that a model writes.
            "errors": "backslashreplace" if stream.errors == "strict" else stream.errors,
            "line_buffering": stream.line_buffering,
            "write_through": stream.write_through,
        }
        self.whatever = whatever
        self.failure: OSError | None = None
        """Why something was left out that somebody may be waiting for."""
        super().__init__(stream.detach(), **facts)

    def write(self, text: str) -> int:
        """As of the base class."""
        try:
            return super().write(text)
        except OSError as error:
            self._forgive(error)
        return len(text)

    def flush(self) -> None:
        """As of the base class."""
        try:
            super().flush()
        except OSError as error:
            self._forgive(error)

    def _forgive(self, error: OSError) -> None:
        if error.errno not in _READER_IS_GONE:
            self.failure = error
            if not self.whatever:
                raise error


def outlast_readers(whatever: bool) -> None:
    """Let this process go on when its standard output, or error output, cannot be written."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by the caller: no file that is opened later may take its place
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and not isinstance(stream, LastingOutput):
            setattr(sys, name, LastingOutput(stream, whatever))


def end_of_output(code: int | OSError) -> int:
    """The exit code of a command that ended with `code`, or by an error of its output.

    Says on the error output if standard output is not complete. Raises any other error.
    """
    try:
        if isinstance(code, OSError):
            raise code
        sys.stdout.flush()
    except OSError as error:
        if error is not getattr(sys.stdout, "failure", None):
            raise
        code = 1
    if isinstance(sys.stdout, LastingOutput) and sys.stdout.failure is not None:
        text = f"standard output is not complete: {sys.stdout.failure.strerror}"
        print(f"{'note' if sys.stdout.whatever else 'error'}: {text}", file=sys.stderr, flush=True)
        sys.stdout.whatever = True  # the interpreter tries once more at its end
    assert isinstance(code, int)
    return code
