"""Which code runs: its commit, what of it is in no commit, and its license."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

DIFF_FILE = "code.diff"
"""In the run directory: what differed from the commit at the first start that had a difference."""

MAX_DIFF_BYTES = 2_000_000
"""More than code ever changes between two commits; a diff of data is cut there."""


SNAPSHOT_FILE = "snapshot.json"
"""Beside the packages of a copy that a job runs from: the `git_state` of what was copied."""


def license_text() -> str:
    """The license of this project: of the checkout, or as it was installed."""
    beside = _folder().parent / "LICENSE"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    text = metadata.distribution("hysparse-megatron").read_text("licenses/LICENSE")
    assert text is not None, "the wheel holds it"
    return text


def git_state() -> dict[str, str | bool] | None:
    """Commit of the code that runs and whether it was changed; None outside a git checkout.

    A copy made for a job also says where it lies: in RUN_DIR/`snapshot`.
    """
    copied = _folder().parent / SNAPSHOT_FILE
    if copied.is_file():
        return json.loads(copied.read_text())
    try:
        # Installed into an environment inside another project's checkout, it is not of that one.
        _git("ls-files", "--error-unmatch", str(Path(__file__).resolve()))
        commit = _git("rev-parse", "HEAD").decode().strip()
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def record_source(run_path: Path, starts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """`git_state` for the record of a start, with the file in `run_path` that holds the diff.

    `starts` are the records of the starts before. The file is that of an earlier start if nothing
    has changed since, else a new one; no file of an earlier start is written over.
    """
    state: dict[str, Any] | None = git_state()
    if state is None or not state["dirty"] or "snapshot" in state:
        return state
    try:
        difference = _difference()
    except (OSError, subprocess.SubprocessError) as error:
        return {**state, "diff": f"not saved: {error}"}
    names = [
        start["git"]["diff"]
        for start in starts
        if isinstance(start.get("git"), dict) and "diff" in start["git"]
    ]
    for name in names:
        path = run_path / name
        if path.is_file() and path.read_bytes() == difference:
            return {**state, "diff": name}
    stem, _, suffix = DIFF_FILE.partition(".")
    later = (f"{stem}-{number}.{suffix}" for number in itertools.count(len(starts) + 1))
    free = (one for one in itertools.chain([DIFF_FILE], later) if not (run_path / one).exists())
    name = next(free)
    with (run_path / name).open("xb") as file:
        file.write(difference)
    return {**state, "diff": name}


def _difference() -> bytes:
    """Changes of what git knows, after a list of what it does not know, which may hold anything."""
    unknown = _git("ls-files", "--others", "--exclude-standard", "--full-name", ":/").splitlines()
    found = b"".join(b"# not in git: " + name + b"\n" for name in unknown)
    command = ["git", "-C", str(_folder()), "diff", "--no-color", "--no-ext-diff", "HEAD"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        found += process.stdout.read(MAX_DIFF_BYTES + 1)
        process.kill()
    if len(found) > MAX_DIFF_BYTES:
        cut = f"\n# cut here: longer than {MAX_DIFF_BYTES:,} bytes\n"
        found = found[:MAX_DIFF_BYTES] + cut.encode()
    return found


def _git(*arguments: str) -> bytes:
    command = ["git", "-C", str(_folder()), *arguments]
    return subprocess.run(command, capture_output=True, check=True, timeout=10).stdout


def _folder() -> Path:
    """That of the code that runs."""
    return Path(__file__).resolve().parent
