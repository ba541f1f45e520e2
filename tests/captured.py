"""Commands that tests run, with what they write."""

import subprocess
from collections.abc import Callable, Sequence
from typing import Any

Call = Callable[..., Any]
"""The fixture `call`."""


def captured(words: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run to its end, with its output as text. `options` are those of `subprocess.run`."""
    options = {"check": False, "capture_output": True, "text": True, **options}
    return subprocess.run(words, **options)
