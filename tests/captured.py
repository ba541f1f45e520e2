"""Commands that tests run, with what they write."""

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Call = Callable[..., Any]
"""The fixture `call`."""


def captured(
    words: Sequence[str], *, code: int | None = 0, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run to its end, with `code` unless that is None. `options` are those of `subprocess.run`."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    assert code in (None, done.returncode), (
        f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return done


def import_path(*folders: str | Path) -> str:
    """PYTHONPATH of a command that looks in `folders`, and then where this process was told to."""
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*map(str, folders), *([given] if given else [])])
