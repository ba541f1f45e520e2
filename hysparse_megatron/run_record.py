"""`run.json`: the id that a run keeps over all its starts, the starts, and the submitted jobs.

A directory that was copied is another run: both would otherwise go on in one run of the tracker. So
the file also says where its directory was.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from pathlib import Path
from typing import Any

from hysparse_megatron.checkpoint.store import published, read_manifest
from hysparse_megatron.errors import CheckpointError
from hysparse_megatron.status import read_object, write_json

RECORD_FILE = "run.json"

_TRACKED = re.compile(r"(?:offline-)?run-(?P<time>\d{8}_\d{6})-(?P<id>\w+)")
"""A folder of W&B."""


def read_record(run_path: Path) -> dict[str, Any] | None:
    """What the file says; empty without one, None if it is garbled."""
    try:
        record = read_object(run_path / RECORD_FILE)
    except FileNotFoundError:
        return {}
    if record is None or not isinstance(record.get("starts", []), list):
        return None
    return record


def write_record(run_path: Path, record: dict[str, Any]) -> None:
    """Replace the file."""
    write_json(run_path / RECORD_FILE, record, durable=True)


def open_record(run_path: Path, name: str) -> tuple[dict[str, Any], list[str]]:
    """The record to go on with, and warnings. Only for the owner of the directory.

    A garbled file is set aside, and its id taken from where else it stands: the manifests and the
    tracker's folders. A copy of a directory whose original is still there, or that comes from
    another machine, gets an id of its own. Writes nothing else.
    """
    warnings = []
    record = read_record(run_path)
    if record is None:
        record = {}
        aside = run_path / f"{RECORD_FILE}.damaged-{secrets.token_hex(3)}"
        os.rename(run_path / RECORD_FILE, aside)
        known = _id_elsewhere(run_path)
        if known is not None:
            record["id"] = known
        warnings.append(
            f"{run_path / RECORD_FILE} was damaged: kept as {aside.name}; the run "
            + (f"keeps its id {known}" if known else "gets a new id, as the old one stands nowhere")
        )
    elif _is_copy(record, run_path):
        former = {"id": record.pop("id", None), **record["place"]}
        record["copied_from"] = former
        record.pop("jobs", None)
        warnings.append(
            f"{run_path} is a copy of {former['path']} on {former['host']}, which may go on too: "
            "it gets an id of its own"
        )
    record.setdefault("id", secrets.token_hex(4))
    record.setdefault("name", name)
    record.setdefault("starts", [])
    record["place"] = {
        "path": str(run_path.resolve()),
        "host": socket.gethostname(),
        "inode": run_path.stat().st_ino,
    }
    return record, warnings


def add_job(run_path: Path, job: str) -> None:
    """Note a job that was submitted for this run."""
    record = read_record(run_path) or {}
    record.setdefault("jobs", []).append(job)
    write_record(run_path, record)


def submitted_jobs(run_path: Path) -> list[str]:
    """Jobs that were submitted for this run, oldest first."""
    return list((read_record(run_path) or {}).get("jobs", []))


def other_run_warnings(config_file: Path | None, run_path: Path) -> list[str]:
    """What a configuration file in a run directory says of a run elsewhere, as after a move."""
    home = None if config_file is None else config_file.absolute().parent
    if home is None or not (home / RECORD_FILE).is_file() or home.resolve() == run_path.resolve():
        return []
    return [
        f"{config_file} lies in a run directory and names another, run_dir={run_path}: the run in "
        f"{home} does not go on. If it was moved, change run_dir in the file"
    ]


def _is_copy(record: dict[str, Any], run_path: Path) -> bool:
    """Whether the record is that of another directory, which was not simply moved to here."""
    place = record.get("place")
    if not isinstance(place, dict) or not {"path", "host", "inode"} <= place.keys():
        return False  # older than places are
    if place["path"] == str(run_path.resolve()) or place["inode"] == run_path.stat().st_ino:
        return False
    original = Path(place["path"])
    if original.is_dir():
        there = read_record(original) or {}
        return there.get("id") == record.get("id") and not original.samefile(run_path)
    # Where its neighbours can be seen it is gone; else it may be there still.
    return place["host"] != socket.gethostname() and not original.parent.is_dir()


def _id_elsewhere(run_path: Path) -> str | None:
    for checkpoint in published(run_path / "checkpoints"):
        try:
            known = read_manifest(checkpoint).get("run_id")
        except (CheckpointError, AttributeError):
            continue
        if isinstance(known, str):
            return known
    folders = [_TRACKED.fullmatch(path.name) for path in (run_path / "wandb").glob("*run-*")]
    tracked = max(((found["time"], found["id"]) for found in folders if found), default=None)
    return tracked[1] if tracked else None
