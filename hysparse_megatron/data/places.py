"""Where a file lies: on this machine, or in another file system that fsspec knows."""

from __future__ import annotations

import os
import re
import weakref
from typing import BinaryIO

import fsspec

_URL = re.compile(r"([A-Za-z][\w+.-]*)(://|::)")


def is_local(path: str) -> bool:
    """Whether a path is one of this machine, no URL of another file system: all absolute ones are.

    Names may hold `::`. It makes a chain of URLs where a protocol that fsspec knows stands before
    it, an address follows, and nothing of that name is here.
    """
    found = _URL.match(path)
    if found is None:
        return True
    protocol, mark = found.groups()
    if mark == "://":
        return False
    is_known = protocol in fsspec.registry or protocol in fsspec.available_protocols()
    return not is_known or "://" not in path or os.path.lexists(path)


def open_place(path: str) -> BinaryIO:
    """A file to read, in binary. fsspec would cut a local name that holds `::`."""
    if is_local(path):
        return open(path, "rb")
    opened = fsspec.open(path, "rb")
    stream: BinaryIO = opened.open()
    # An archive that the file lies in is closed when nothing refers to it any more.
    weakref.finalize(stream, lambda kept: None, opened)
    return stream
