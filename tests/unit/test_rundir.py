"""The run directory: its lock, its records, and how they survive restarts."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hysparse_megatron import rundir
from hysparse_megatron.checkpoint.manifest import write_manifest
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.frozen import config_hash, load_frozen
from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.run_record import add_job, submitted_jobs
from hysparse_megatron.rundir import RunDirectory, amend_status, prepare_run, versions
from hysparse_megatron.runtime.flight_recorder import LOG_FOLDER
from hysparse_megatron.status import read_status, write_json


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return compose([f"run_dir={tmp_path / 'run'}", "name=first"])


def started(config: Config, facts: dict[str, Any] | None = None) -> RunDirectory:
    """The directory of a start that has ended."""
    directory = RunDirectory(config, facts or {})
    directory.close()
    return directory


HOLD = """
import sys
from hysparse_megatron.config.compose import compose
from hysparse_megatron.rundir import RunDirectory
directory = RunDirectory(compose([f"run_dir={sys.argv[1]}"]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.distributed
def test_a_second_process_is_refused_until_the_first_is_gone(config: Config) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(config.run_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        record = (config.run_path / "run.json").read_text()
        frozen = (config.run_path / "config.yaml").read_text()
        with pytest.raises(ConfigError, match=rf"locked by process {holder.pid} on "):
            RunDirectory(config)
        # The refused one left no trace.
        assert (config.run_path / "run.json").read_text() == record
        assert (config.run_path / "config.yaml").read_text() == frozen
    finally:
        holder.kill()
        holder.wait()
    RunDirectory(config).close()


def test_closing_gives_the_directory_up(config: Config) -> None:
    first = RunDirectory(config)
    with pytest.raises(ConfigError, match=rf"locked by process {os.getpid()} "):
        RunDirectory(config)
    first.close()
    RunDirectory(config).close()


def test_a_file_system_without_locks_is_warned_of(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(rundir.fcntl, "flock", refuse)
    assert prepare_run(config) == ([], [])
    directory = RunDirectory(config)
    directory.write_status("running", step=1)
    directory.close()
    assert directory.warnings == [
        f"the file system of {config.run_path} has no locks (Function not implemented): make sure "
        "that no other run writes there"
    ]


def test_records_of_several_starts(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    first = RunDirectory(config)
    assert first.changed_keys == []
    assert first.config_hash == config_hash(config)
    assert load_frozen(config.run_path / "config.yaml") == config
    assert (config.run_path / LOG_FOLDER).is_dir()
    assert first.restarts == 0
    first.close()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    changed = replace(config, train=replace(config.train, steps=7), name="second")
    second = RunDirectory(changed)
    assert second.restarts == 1
    second.close()
    record = json.loads((config.run_path / "run.json").read_text())
    assert record == second.facts
    assert record["id"] == first.facts["id"]
    assert record["name"] == "first"
    assert [start["config_hash"] for start in record["starts"]] == [
        config_hash(config),
        config_hash(changed),
    ]
    assert [start["slurm_job"] for start in record["starts"]] == [None, "77"]
    for start in record["starts"]:
        assert set(start) >= {"time", "host", "cluster", "git", "versions"}
        assert start["versions"]["torch"].startswith("2.")
    assert sorted(second.changed_keys) == [
        "name: first -> second",
        f"train.steps: {config.train.steps} -> 7",
    ]
    # A start that has not come so far as to train leaves the settings that the run has.
    assert load_frozen(config.run_path / "config.yaml") == config
    second.keep_settings()
    assert load_frozen(config.run_path / "config.yaml") == changed


def test_ids_of_two_runs_differ(tmp_path: Path) -> None:
    runs = [RunDirectory(compose([f"run_dir={tmp_path / name}"])) for name in "ab"]
    for run in runs:
        run.close()
    assert runs[0].facts["id"] != runs[1].facts["id"]
    assert len(runs[0].facts["id"]) == 8


def test_a_changed_long_layout_is_named_by_its_key(config: Config) -> None:
    """YAML may write a long text over several lines."""
    old = "F " + "S " * 60 + "F"
    new = "F " + "S " * 50 + "W " * 10 + "F"
    RunDirectory(replace(config, model=replace(config.model, layout=old))).close()
    second = started(replace(config, model=replace(config.model, layout=new)))
    assert second.changed_keys == [f"model.layout: {old} -> {new}"]


def test_a_frozen_file_of_another_version_does_not_stop_a_start(config: Config) -> None:
    RunDirectory(config).close()
    path = config.run_path / "config.yaml"
    path.write_text(path.read_text() + "of_another_version: 3\n")
    again = started(config)
    assert again.changed_keys == [f"{path} could not be read"]


GARBLED = [
    b"",
    b'{"id": "a"',
    b"[]",
    b"3",
    b"\xff\xfe",
    b'{"id": "a", "starts": 3}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("content", GARBLED)
def test_a_garbled_record_is_kept_and_the_run_goes_on(config: Config, content: bytes) -> None:
    RunDirectory(config).close()
    (config.run_path / "run.json").write_bytes(content)
    again = started(config)
    (aside,) = config.run_path.glob("run.json.damaged-*")
    assert aside.read_bytes() == content
    (warning,) = again.warnings
    assert f"{config.run_path / 'run.json'} was damaged: kept as {aside.name}" in warning
    assert len(again.facts["id"]) == 8
    assert submitted_jobs(config.run_path) == []


def test_the_record_says_what_runs_each_start(config: Config) -> None:
    RunDirectory(config, {"device": "CPU", "ranks": 2}).close()
    again = RunDirectory(config, {"device": "Fast GPU", "ranks": 4})
    told = [(start["device"], start["ranks"]) for start in again.facts["starts"]]
    again.close()
    assert told == [("CPU", 2), ("Fast GPU", 4)]


@pytest.mark.parametrize("where", ["manifest", "tracker"])
def test_the_id_in_a_garbled_record_comes_from_where_else_it_stands(
    config: Config, where: str
) -> None:
    first = started(config)
    known = first.facts["id"]
    if where == "manifest":
        facts = {"bytes": 1, "sha256": "0" * 64}
        folders = [config.run_path / "checkpoints" / f"step-{step:08d}" for step in (8, 12)]
        for folder in folders:
            folder.mkdir(parents=True)
        files = {"__0_0.distcp": facts, ".metadata": facts}
        write_manifest(folders[0], {"step": 8, "run_id": known, "files": files})
        (folders[1] / "manifest.json").write_text("[]")
    else:
        for name in (f"offline-run-20260102_030405-{known}", "run-20260101_030405-older", "latest"):
            (config.run_path / "wandb" / name).mkdir(parents=True)
    (config.run_path / "run.json").write_text("")
    again, warnings = prepare_run(config)[1], []
    assert f"keeps its id {known}" in again[0]
    second = started(config)
    assert (second.facts["id"], second.warnings) == (known, warnings)


@pytest.mark.parametrize("content", GARBLED)
def test_a_garbled_status_is_none_and_is_replaced(config: Config, content: bytes) -> None:
    config.run_path.mkdir(parents=True)
    (config.run_path / "status.json").write_bytes(content)
    assert read_status(config.run_path).get("state") is None
    amend_status(config.run_path, 7, "rank 1 died", state="failed", rank=1)
    assert read_status(config.run_path)["cause"] == "rank 1 died"


def test_a_copy_is_a_run_of_its_own(config: Config, tmp_path: Path) -> None:
    """Both would go on in one run of the tracker."""
    original = started(config)
    add_job(config.run_path, "77")
    shutil.copytree(config.run_path, tmp_path / "copy")
    there = replace(config, run_dir=str(tmp_path / "copy"))
    for _ in range(2):
        copy = started(there)
        assert copy.facts["id"] != original.facts["id"]
        assert copy.facts["copied_from"]["id"] == original.facts["id"]
        assert submitted_jobs(there.run_path) == [], "the job is the original's"
    assert copy.warnings == [], "told once"
    again = started(config)
    assert (again.facts["id"], again.warnings) == (original.facts["id"], [])
    shutil.copytree(config.run_path, tmp_path / "submitted")
    (warning,) = prepare_run(replace(config, run_dir=str(tmp_path / "submitted")))[1]
    assert f"is a copy of {config.run_path.resolve()} on {socket.gethostname()}" in warning


def test_a_run_that_was_moved_stays_what_it_was(config: Config, tmp_path: Path) -> None:
    """By a rename, to another file system, to a link; and one that an older version wrote."""
    first = started(config)
    (tmp_path / "link").symlink_to(config.run_path)
    shutil.copytree(config.run_path, tmp_path / "other_file_system")
    for name in ("link", "other_file_system", "renamed"):
        if name == "other_file_system":
            shutil.rmtree(config.run_path)
        elif name == "renamed":
            (tmp_path / "other_file_system").rename(tmp_path / name)
        moved = started(replace(config, run_dir=str(tmp_path / name)))
        assert (moved.facts["id"], moved.warnings) == (first.facts["id"], []), name
    path = tmp_path / "renamed" / "run.json"
    write_json(path, {"id": "old", "starts": []})
    shutil.copytree(path.parent, tmp_path / "again")
    old = started(replace(config, run_dir=str(tmp_path / "again")))
    assert old.facts["id"] == "old"


def test_a_copy_from_another_machine_is_a_run_of_its_own(config: Config) -> None:
    first = started(config)
    record = json.loads((config.run_path / "run.json").read_text())
    record["place"] |= {"host": "elsewhere", "inode": -1, "path": "/nowhere/at/all/run"}
    write_json(config.run_path / "run.json", record)
    copy = started(config)
    assert copy.facts["id"] != first.facts["id"]
    assert "is a copy of /nowhere/at/all/run on elsewhere" in copy.warnings[0]


def test_status(config: Config) -> None:
    RunDirectory(config).close()
    directory = RunDirectory(config)
    directory.status.saw_checkpoint(2, seconds=1_000_000_000.0)
    directory.status.write("running", step=3)
    directory.status.write("failed", exit_code=5, cause="why", rank=1)
    directory.close()
    status = json.loads((config.run_path / "status.json").read_text())
    assert status.pop("time").endswith("Z")
    assert status.pop("started").endswith("Z")
    assert status.pop("checkpoint_age_seconds") > 1e8
    assert status == {
        "state": "failed",
        "step": 3,
        "checkpoint_step": 2,
        "checkpoint_time": "2001-09-09T01:46:40Z",
        "restarts": 1,
        "exit_code": 5,
        "cause": "why",
        "rank": 1,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def test_the_launcher_completes_the_status_of_its_own_run_only(config: Config) -> None:
    path = config.run_path / "status.json"
    amend_status(config.run_path, 7, "rank 1 died", state="failed", rank=1)
    assert json.loads(path.read_text())["cause"] == "rank 1 died"
    directory = RunDirectory(config)
    directory.status.write("running", step=3)
    before = path.read_text()
    amend_status(config.run_path, os.getpid(), "rank 1 died", state="failed")
    assert path.read_text() == before, "somebody else holds the directory"
    directory.status.write("failed", cause="no word from rank 1")
    directory.close()
    amend_status(config.run_path, os.getpid(), None, state="failed", rank=0)
    assert json.loads(path.read_text())["rank"] is None, "rank 0 has told all there is"
    amend_status(config.run_path, os.getpid(), "rank 1 died", state="failed", rank=1)
    found = json.loads(path.read_text())
    assert (found["cause"], found["rank"]) == ("rank 1 died. no word from rank 1", 1)
    assert found["step"] == 3


def test_an_owner_that_was_killed_is_told(config: Config) -> None:
    config.run_path.mkdir(parents=True)
    (config.run_path / ".lock").write_text("process 1 on somewhere since yesterday")
    with_stale_lock = RunDirectory(config)
    assert with_stale_lock.former_owner == "process 1 on somewhere since yesterday"
    with_stale_lock.close()
    after_a_clean_end = RunDirectory(config)
    assert after_a_clean_end.former_owner is None
    after_a_clean_end.close()


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    """A reader sees one of the contents written, never a part, and no other file is left."""
    path = tmp_path / "status.json"
    contents = [{"number": n, "filler": str(n) * 20_000} for n in range(3)]
    write_json(path, contents[0])
    done = threading.Event()
    seen = []

    def read() -> None:
        while not done.is_set():
            seen.append(json.loads(path.read_text()))

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(200):
        write_json(path, contents[turn % 3])
    done.set()
    reader.join()
    assert seen
    assert all(content in contents for content in seen)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["status.json", "run.json", "config.yaml"])
def test_nothing_is_written_through_a_link(config: Config, tmp_path: Path, name: str) -> None:
    """What links where a temporary file might stand, or the file itself, keeps what it leads to."""
    target = tmp_path / "precious"
    target.write_text("mine")
    config.run_path.mkdir(parents=True)
    for link in (name, f"{name}.tmp", f".{name}.{os.getpid()}.tmp"):
        (config.run_path / link).symlink_to(target)
    directory = RunDirectory(config)
    directory.keep_settings()
    directory.status.write("running", step=1)
    directory.close()
    assert target.read_text() == "mine"
    assert not (config.run_path / name).is_symlink()


def test_what_a_killed_write_left_is_removed(config: Config) -> None:
    config.run_path.mkdir(parents=True)
    (config.run_path / ".status.json.0123abcd.tmp").write_text("{")
    RunDirectory(config).close()
    assert [path.name for path in config.run_path.glob(".*")] == [".lock"]


def test_json_that_cannot_be_written_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_versions_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "_PACKAGES", ("torch", "surely-not-installed"))
    found = versions()
    assert found["surely-not-installed"] == "missing"
    assert found["torch"].startswith("2.")
    assert found["python"].startswith("3.12")
