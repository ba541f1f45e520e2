"""The run directory: who owns it, what was run, and how it stands.

config.yaml     the frozen configuration       status.json    how the run stands
run.json        see run_record.py          metrics.jsonl  one row a step
checkpoints/    see checkpoint/store.py        summary.md     written at the end
logs/           see runtime/flight_recorder.py code.diff      see source.py
code/           see launch/snapshot.py         .reserve       see reserve.py
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.metadata
import os
import platform
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from hysparse_megatron import __version__
from hysparse_megatron.checkpoint.store import published
from hysparse_megatron.compatibility import refuse_mismatch
from hysparse_megatron.config.frozen import CONFIG_FILE, config_hash, freeze, load_frozen, to_tree
from hysparse_megatron.config.schema import Config
from hysparse_megatron.continuation import check_continuation
from hysparse_megatron.errors import ConfigError, HySparseError
from hysparse_megatron.files import NO_LOCKS, remove_temporaries
from hysparse_megatron.reserve import Reserve
from hysparse_megatron.run_record import open_record, write_record
from hysparse_megatron.runtime.flight_recorder import LOG_FOLDER
from hysparse_megatron.source import record_source
from hysparse_megatron.status import Status, change_status, read_status, stamp

_PACKAGES = (
    "torch",
    "megatron-core",
    "emerging-optimizers",
    "hydra-core",
    "wandb",
    "tokenizers",
    "numpy",
)


class RunDirectory:
    """One run's directory, opened and locked by rank 0 of the run that writes into it."""

    def __init__(self, config: Config, machine: Mapping[str, Any] | None = None) -> None:
        """Create or reopen the directory. `machine` says what runs this start, for its record.

        Raises ConfigError when another run holds it, or when its checkpoints are of another model,
        of another order of samples or learning rate, or those that the configuration says not to
        resume from, and CheckpointError when they cannot be continued; what is in it stays as it
        was then.
        """
        self.path = config.run_path
        accepted = refuse_start(config)
        self.path.mkdir(parents=True, exist_ok=True)
        no_locks: list[str] = []
        self._lock, self.former_owner = lock(self.path, no_locks.append)
        (self.path / LOG_FOLDER).mkdir(exist_ok=True)
        self.changed_keys = _changed_keys(self.path / CONFIG_FILE, config)
        self.config_hash = config_hash(config)
        self._config = config
        if not (self.path / CONFIG_FILE).exists():
            self.keep_settings()
        remove_temporaries(self.path)
        self.reserve = Reserve(self.path)
        self.facts, damaged = self._open_record(config, machine or {})
        self.warnings = [*no_locks, *damaged, *accepted]
        self.status = Status(self.path, restarts=self.restarts)

    def keep_settings(self) -> None:
        """Freeze the configuration, in place of the last start's: this one has what it needs.

        Not before: other commands read a good run by what it ran with.
        """
        freeze(self._config, self.path)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are written."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The table of steps and evaluations."""
        return self.path / "metrics.jsonl"

    @property
    def restarts(self) -> int:
        """Starts in this directory before this one."""
        return len(self.facts["starts"]) - 1

    def state(self) -> str | None:
        """What `status.json` says now, if anything."""
        return read_status(self.path).get("state")

    def close(self) -> None:
        """Give the directory up for the next run."""
        self.reserve.give_up()
        with contextlib.suppress(OSError):
            self._lock.truncate(0)
        self._lock.close()

    def write_status(self, state: str, **facts: Any) -> None:
        """Replace `status.json`, on a full disk with the room that is reserved for it."""
        self.reserve.attempt(functools.partial(self.status.write, state, **facts))

    def _open_record(
        self, config: Config, machine: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """`run.json`, its list of starts extended by this one, and what was wrong with it."""
        record, warnings = open_record(self.path, config.name)
        record["starts"].append(
            {
                "time": stamp(time.time()),
                "config_hash": self.config_hash,
                "host": socket.gethostname(),
                "cluster": config.cluster.name,
                **machine,
                "git": record_source(self.path, record["starts"]),
                "versions": versions(),
                "slurm_job": os.environ.get("SLURM_JOB_ID"),
            }
        )
        write_record(self.path, record)
        return record, warnings


def prepare_run(config: Config) -> tuple[list[str], list[str]]:
    """Freeze the configuration before any rank starts, and give the run its id.

    Returns lines `key: old -> new` for what differs from the last start in this directory, and
    warnings about its record and of `refuse_start`. Raises what `RunDirectory` does; nothing has
    changed then.
    """
    path = config.run_path
    accepted = refuse_start(config)
    path.mkdir(parents=True, exist_ok=True)
    held, _ = lock(path)
    with held:
        changed = _changed_keys(path / CONFIG_FILE, config)
        record, damaged = open_record(path, config.name)
        freeze(config, path)
        write_record(path, record)
        held.truncate(0)
    return changed, [*damaged, *accepted]


def lock(
    run_path: Path, warn: Callable[[str], None] = lambda text: None
) -> tuple[IO[str], str | None]:
    """Own the directory as long as the returned file is open in this process.

    The system gives the lock back when its process ends or the machine restarts, so one that is
    held is never stale; the second result is the owner that ended without giving it up, if one did.
    On a file system without locks everybody owns it, and `warn` is told. Raises ConfigError when
    another run holds it.
    """
    file = (run_path / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another run"
        file.close()
        raise ConfigError(
            f"run_dir: {run_path} is locked by {owner}; stop it or choose another run_dir"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            file.close()
            raise
        warn(
            f"the file system of {run_path} has no locks ({error.strerror}): make sure that no "
            "other run writes there"
        )
    file.seek(0)
    former = file.read().strip() or None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {stamp(time.time())}")
    file.flush()
    return file, former


def holder(run_path: Path) -> str | None:
    """Who holds the directory now, if anybody. Changes nothing."""
    try:
        with (run_path / ".lock").open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another run"
    except OSError:
        pass  # no run has been here
    return None


def amend_status(run_path: Path, pid: int, cause: str | None, **facts: Any) -> None:
    """Write how a run ended whose rank 0, process `pid`, does not hold the directory (any more).

    `cause` is put before the one that rank 0 told, if it did; without a `cause` that one stands. A
    directory that another run holds, or that cannot be written, stays as it is.
    """
    with contextlib.suppress(HySparseError, OSError):
        run_path.mkdir(parents=True, exist_ok=True)
        held, _ = lock(run_path)
        with held:
            status = read_status(run_path)
            told = status.get("cause") if status.get("pid") == pid else None
            if told is None or cause is not None:
                cause = ". ".join(part for part in (cause, told) if part)
                change_status(run_path, pid=pid, cause=cause, **facts)
            held.truncate(0)


def refuse_start(config: Config) -> list[str]:
    """Raise the errors of `RunDirectory` that its checkpoints give cause for. Changes nothing.

    Returns warnings about what would be an error and was accepted.
    """
    if not config.checkpoint.resume:
        for path in published(config.run_path / "checkpoints"):
            raise ConfigError(
                f"checkpoint.resume=false would write over {path}: choose another run_dir, or "
                "delete its checkpoints"
            )
    refuse_mismatch(config)
    return check_continuation(config)


def _changed_keys(path: Path, config: Config) -> list[str]:
    """Lines `key: old -> new` for settings that differ from the last start in this directory."""
    if not path.exists():
        return []
    try:
        old = _flat(load_frozen(path))
    except ConfigError:
        return [f"{path} could not be read"]
    new = _flat(config)
    return [
        f"{key}: {old.get(key, 'unset')} -> {new[key]}" for key in new if old.get(key) != new[key]
    ]


def _flat(config: Config) -> dict[str, str]:
    """`section.key: value` pairs of a configuration."""
    flat: dict[str, str] = {}
    for name, value in to_tree(config).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": str(inner) for key, inner in value.items()}
        else:
            flat[name] = str(value)
    return flat


def versions() -> dict[str, str]:
    """Versions of Python, this package and what it stands on."""
    found = {"python": platform.python_version(), "hysparse-megatron": __version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found
