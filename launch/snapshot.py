"""The code of a job, as it is when the job is submitted.

A job may wait for days and start again for weeks; the checkout is edited meanwhile. So the packages
and presets are copied into the run directory, where the job's Python finds them first.

    RUN_DIR/code/DIGEST/   hysparse_megatron/ hysparse_kernels/ launch/ conf/ snapshot.json
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

from hysparse_megatron.config.compose import config_directory
from hysparse_megatron.source import SNAPSHOT_FILE, git_state

FOLDER = "code"
_PACKAGES = ("hysparse_megatron", "hysparse_kernels")
_LEFT_OUT = ("__pycache__", "local")  # a user's own settings stand in the frozen configuration


def snapshot_folder(run_path: Path) -> Path:
    """Where the code as it is now has its copy, made or not: equal code is kept once."""
    digest = hashlib.sha256()
    for name, file in _files().items():
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return run_path.absolute() / FOLDER / digest.hexdigest()[:12]


def make_snapshot(run_path: Path) -> Path:
    """Copy the code, unless its copy is there already; returns the folder."""
    folder = snapshot_folder(run_path)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    for name, file in _files().items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, made / name)
    state = git_state() or {"commit": "no git checkout", "dirty": False}
    facts = {**state, "snapshot": f"{FOLDER}/{folder.name}"}
    (made / SNAPSHOT_FILE).write_text(json.dumps(facts) + "\n")
    made.chmod(0o755)
    os.rename(made, folder)
    return folder


def _files() -> dict[str, Path]:
    """The files by their names in the copy, in a fixed order."""
    roots = {}
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin
        roots[package] = Path(spec.origin).resolve().parent
    # Inside the package where that was installed.
    beside = {"conf": config_directory(), "launch": Path(__file__).resolve().parent}
    inside = roots["hysparse_megatron"]
    roots |= {name: root for name, root in beside.items() if root.parent != inside}
    return {
        f"{name}/{file.relative_to(root).as_posix()}": file
        for name, root in sorted(roots.items())
        for file in sorted(root.rglob("*"))
        if file.is_file() and not set(file.relative_to(root).parts) & set(_LEFT_OUT)
    }
