"""Checkpoint directories: which one is the latest, whether it is whole, which ones are kept.

    checkpoints/step-00000100/                  a checkpoint
    checkpoints/step-00000100/manifest.json     written last: files, sizes, hashes, step, ...
    checkpoints/step-00000100/proven            empty; a good step was made after it
    checkpoints/step-00000200.tmp-1f09ab/       being written, or left behind by a killed run
    checkpoints/step-00000150.aside-77d2c0/     was newer than the one a run went on from

"Latest" is computed by looking: the newest directory with a manifest whose files are there, as
large as it says and with the content it says. Nothing here knows torch or other ranks; `writer`
writes checkpoints and `choice` lets all ranks agree on one.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from hysparse_megatron.checkpoint.manifest import MANIFEST, read_manifest
from hysparse_megatron.errors import CheckpointError
from hysparse_megatron.files import sha256_of
from hysparse_megatron.runtime import faults

Problems = Callable[[Path], list[str]]
"""What is wrong with a checkpoint; nothing of a whole one."""


class Agreed(Protocol):
    """Calls what looks at the file system and returns its answer."""

    def __call__[Answer](self, look: Callable[[], Answer]) -> Answer:
        """What `look` returns."""


def _alone[Answer](look: Callable[[], Answer]) -> Answer:
    return look()


_PROVEN = "proven"
_PUBLISHED = re.compile(r"step-([0-9]+)")
_UNFINISHED = re.compile(r"step-[0-9]+\.tmp(-\w+)?")


def step_directory(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps belongs."""
    return checkpoints / f"step-{step:08d}"


def step_of(directory: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(directory.name.removeprefix("step-"))


def published(checkpoints: Path) -> list[Path]:
    """Checkpoints, whole or not, newest first."""
    found = (path for path in checkpoints.glob("step-*") if _PUBLISHED.fullmatch(path.name))
    return sorted(found, key=step_of, reverse=True)


def unfinished_name(final: Path) -> Path:
    """A fresh directory name beside `final` for what is not a checkpoint yet, or not any more."""
    return final.with_name(f"{final.name}.tmp-{secrets.token_hex(3)}")


def remove_leftovers(checkpoints: Path) -> None:
    """Delete what killed runs were writing or deleting. Only for the owner of the run directory."""
    for path in checkpoints.glob("step-*"):
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def latest_checkpoint(
    checkpoints: Path, problems: Problems | None = None, agreed: Agreed = _alone
) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and what is wrong with the ones that are newer.

    (None, []) where there is none at all. Raises CheckpointError when there are checkpoints and not
    one is whole: a fresh start would hide that. Arguments as those of `resolve`.
    """
    rejected: list[str] = []
    for directory in agreed(lambda: published(checkpoints)):
        found = (problems or problems_of)(directory)
        if not found:
            return directory, rejected
        rejected += found
    if rejected:
        raise CheckpointError(
            f"no checkpoint is valid: {'; '.join(rejected)}. Restore one, or delete them to start "
            "anew"
        )
    return None, []


def went_back(checkpoints: Path, step: int) -> bool:
    """Whether the newest checkpoint comes from an earlier start that went back to `step`.

    The same command goes on then: it does not go back once more.
    """
    for directory in published(checkpoints):
        with contextlib.suppress(CheckpointError):
            return read_manifest(directory).get("went_back_to") == step
    return False


def to_continue(checkpoints: Path, step: int | None) -> Path | None:
    """The checkpoint that a start with `checkpoint.step` goes on from, as far as sizes tell.

    None where there is none or it is damaged: the start says so when it comes to load it.
    """
    candidates = published(checkpoints)
    if step is not None and not went_back(checkpoints, step):
        candidates = [step_directory(checkpoints, step)]
    whole = (path for path in candidates if not problems_of(path, content=False))
    return next(whole, None)


def problems_of(directory: Path, content: bool = True) -> list[str]:
    """What is wrong with a checkpoint directory.

    A link to nowhere, a missing or odd manifest, a name of another step, missing or truncated files
    or links to elsewhere and, with `content`, files whose hash is another than the manifest says.
    """
    try:
        directory.stat()
    except OSError as error:
        return [f"{directory} cannot be read: {error.strerror}{_linked(directory)}"]
    try:
        files = read_manifest(directory)["files"]
        home = directory.resolve()
    except (CheckpointError, OSError) as error:
        return [f"{directory / MANIFEST}: {error}"]
    problems = []
    for name, entry in files.items():
        path = directory / name
        try:
            if not path.is_file():
                problems.append(f"{path} is missing")
            elif not path.resolve().is_relative_to(home):
                problems.append(f"{path} is a link to {path.resolve()}, outside of the checkpoint")
            elif (found := path.stat().st_size) != (told := entry["bytes"]):
                problems.append(f"{path} has {found} bytes; the manifest says {told} bytes")
        except OSError as error:
            problems.append(f"{path} cannot be read: {error}")
    if content and not problems:
        digests = {name: entry["sha256"] for name, entry in files.items()}
        problems = changed_files(directory, digests)
    return problems


def _linked(directory: Path) -> str:
    return f" (a link to {directory.readlink()})" if directory.is_symlink() else ""


def size_of(directory: Path) -> int:
    """Bytes of all files, without those that cannot be read or go away meanwhile."""
    size = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            size += path.stat().st_size if path.is_file() else 0
    return size


def changed_files(directory: Path, digests: dict[str, str]) -> list[str]:
    """Which of the files, named with the SHA-256 they should have, hold something else."""
    problems = []
    for name, digest in digests.items():
        path = directory / name
        try:
            if sha256_of(path) != digest:
                problems.append(f"{path} has another content than the manifest says")
        except OSError as error:
            problems.append(f"{path} cannot be read: {error}")
    return problems


def tokenizer_facts(manifest: dict[str, Any]) -> dict[str, Any]:
    """`tokenizer_sha256` and `vocab_size` of what a model reads, as far as its manifest says.

    A run remembers them among its data; weights that come from elsewhere have no data.
    """
    return manifest.get("data") or manifest.get("tokenizer") or {}


def is_checkpoint(path: Path) -> bool:
    """Whether a user who names `path` means one checkpoint, and not a run."""
    return (path / MANIFEST).exists() or bool(_PUBLISHED.fullmatch(path.name))


def resolve(
    path: Path,
    step: int | None = None,
    problems: Problems | None = None,
    agreed: Agreed = _alone,
    log: Callable[[str], None] = lambda text: None,
) -> Path:
    """The checkpoint that a user means by a step directory or a run directory.

    Args:
        path: of a checkpoint, or of a run: the checkpoint after `step` of that, or the newest.
        step: of the checkpoint in the run; None takes the newest that is whole.
        problems: what is wrong with a checkpoint; the default is `problems_of`.
        agreed: calls what looks at the file system; `choice` lets all ranks take rank 0's answer.
        log: is told of newer checkpoints that are left out.

    Raises:
        CheckpointError: there is no valid one.
    """
    problems = problems or problems_of
    if not agreed(lambda: is_checkpoint(path)):
        if step is None:
            found, rejected = latest_checkpoint(path / "checkpoints", problems, agreed)
            for problem in rejected:
                log(f"WARNING: a newer checkpoint is damaged and left out: {problem}")
            if found is None:
                raise nothing_at(path)
            return found
        path = step_directory(path / "checkpoints", step)
    wrong = problems(path)
    if wrong:
        raise CheckpointError(f"{path} is damaged or missing: {'; '.join(wrong)}")
    return path


def meant(run_dir: Path, text: str) -> tuple[Path, int | None]:
    """`path` and `step` of `resolve` for `newest`, a step of the run, or the path of another."""
    if text == "newest":
        return run_dir, None
    return (run_dir, int(text)) if text.isdecimal() else (Path(text), None)


def nothing_at(path: Path, allowed: str = "a step directory or a run directory") -> CheckpointError:
    """The error for a path with no checkpoint at all, with what could have been named."""
    return CheckpointError(f"no valid checkpoint at {path}; name {allowed}")


def set_aside(checkpoints: Path, after: int) -> list[Path]:
    """Rename checkpoints newer than step `after`, which a run is about to go on from.

    Damaged or given up, they must neither be taken for the latest of this run later on nor stand
    where it will write. Returns their new names; nothing is deleted.
    """
    renamed = []
    for directory in published(checkpoints):
        if step_of(directory) > after:
            place = directory.with_name(f"{directory.name}.aside-{secrets.token_hex(3)}")
            os.rename(directory, place)
            renamed.append(place)
    return renamed


def superfluous(checkpoints: Path, keep: int, keep_every: int, newest: Path) -> list[Path]:
    """Checkpoints before `newest` that the rules do not keep, newest first.

    The newest `keep` valid ones stay, `newest` among them and always (0 keeps all), the newest that
    is proven, and those whose step is a multiple of `keep_every` (0: no step is). Damaged ones are
    not ours to judge and stay, and so does what a link stands for.
    """
    if not keep:
        return []
    valid = older_than(newest)
    # Those of early versions are not marked: one that another was saved after passes for proven.
    proven = next((path for path in [newest, *valid] if is_proven(path)), (valid or [newest])[0])
    return [
        path
        for path in valid[keep - 1 :]
        if path != proven
        and not path.is_symlink()
        and (not keep_every or step_of(path) % keep_every)
    ]


def older_than(newest: Path) -> list[Path]:
    """Valid checkpoints, by sizes, of fewer steps in the same run, newest first."""
    older = [path for path in published(newest.parent) if step_of(path) < step_of(newest)]
    return [path for path in older if not problems_of(path, content=False)]


def is_proven(directory: Path) -> bool:
    """Whether a good step is known to have been made with the content of a checkpoint."""
    return (directory / _PROVEN).exists()


def mark_proven(directory: Path) -> None:
    """Note that a good step was made. Without the note, which a full disk refuses, more is kept."""
    if not is_proven(directory):
        with contextlib.suppress(OSError):
            (directory / _PROVEN).touch()


def prune(
    checkpoints: Path, keep: int, keep_every: int, newest: Path
) -> tuple[list[Path], list[str]]:
    """Delete what is `superfluous`. Call it on rank 0.

    Returns what was deleted, and what could not be, with the reason: no error, as training goes on.
    """
    deleted, failures = [], []
    for directory in superfluous(checkpoints, keep, keep_every, newest):
        try:
            faults.reach("prune", step_of(directory))
            # What is deleted in part must not pass for a checkpoint.
            doomed = unfinished_name(directory)
            os.rename(directory, doomed)
            shutil.rmtree(doomed)
            deleted.append(directory)
        except OSError as error:
            failures.append(f"{directory} could not be deleted: {error}")
    return deleted, failures
