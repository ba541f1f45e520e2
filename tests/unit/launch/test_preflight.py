"""What the checks before a run find: everything that can be wrong, made wrong."""

import os
import re
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import Config
from hysparse_megatron.data.card import load_prepared
from hysparse_megatron.plan.suggest import overview_of
from hysparse_megatron.rundir import lock
from launch import checks
from launch.findings import Finding, Level, as_text, has_failed
from launch.preflight import main
from launch.rank_checks import _merged, _same_everywhere
from tests.captured import Call
from tools.prepare_data import main as prepare_data

TINY = ["model=tiny_hysparse", "train.steps=20"]


def config_of(tmp_path: Path, *overrides: str) -> Config:
    return compose([*TINY, f"run_dir={tmp_path / 'run'}", *overrides])


def only(findings: list[Finding], what: str) -> Finding:
    (found,) = [finding for finding in findings if finding.what == what]
    return found


def test_a_good_run_has_no_failure(tmp_path: Path, call: Call) -> None:
    told = call(main, [*TINY, f"run_dir={tmp_path / 'run'}"]).out
    for what in ("packages", "GPUs", "data", "disk", "run directory", "tracker"):
        assert f"OK    {what}" in told
    assert not (tmp_path / "run").exists(), "it only looks"


def test_bad_settings_exit_with_2(call: Call) -> None:
    assert "model.layout" in call(main, ["model.layout=S F"], code=2).err


def test_a_package_out_of_its_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "1.13", "megatron-core": None}
    real = checks._version
    monkeypatch.setattr(checks, "_version", lambda name: versions.get(name, real(name)))
    failures = [
        finding for finding in checks.packages(config_of(tmp_path)) if finding.level is Level.FAIL
    ]
    assert {finding.found for finding in failures} == {
        "torch 1.13",
        "megatron-core not installed",
    }
    assert all(finding.fix.startswith("pip install") for finding in failures)


def test_missing_transformer_engine_costs_something_only_on_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checks._version
    monkeypatch.setattr(
        checks, "_version", lambda name: None if name == "transformer-engine" else real(name)
    )
    assert all(one.level is Level.OK for one in checks.packages(config_of(tmp_path)))
    on_gpus = list(checks.packages(config_of(tmp_path, "train.precision=bf16")))
    assert any(one.level is Level.WARN and "transformer-engine" in one.found for one in on_gpus)
    wanted = list(checks.packages(config_of(tmp_path, "model.layers=te")))
    assert any(one.level is Level.FAIL and "transformer-engine" in one.found for one in wanted)


@pytest.fixture
def with_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Puts an nvidia-smi that sees so many GPUs in front of the path."""

    def put(count: int) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\nyes 'H100, 81559 MiB, 580.1' | head -n {count}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return put


@pytest.mark.parametrize(("there", "level"), [(8, Level.OK), (7, Level.WARN), (0, Level.WARN)])
def test_gpus(with_gpus: Callable[[int], None], tmp_path: Path, there: int, level: Level) -> None:
    with_gpus(there)
    (found,) = checks.gpus(config_of(tmp_path, "cluster=slurm"))
    assert found.level is level
    assert (f"{there} x H100, 81559 MiB, 580.1" in found.found) is (there > 0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset made by the tool."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"document {number} of a few words\n" * 5)
    output = folder / "prepared"
    arguments = ["--tokenizer", "bytes", "--output", str(output), "--validation-fraction", "0.2"]
    assert prepare_data([*arguments, *map(str, folder.glob("*.txt"))]) == 0
    return output


def test_prepared_data_are_named_by_their_hashes(prepared: Path, tmp_path: Path) -> None:
    for setting in (f"data.path={prepared}", f"data.blend='1.0 {prepared}'"):
        found, enough = checks.data(config_of(tmp_path, setting, "train.steps=1"))
        assert found.level is Level.OK
        assert "tokens in" in found.found
        assert "fingerprint" in found.found
        assert enough.what == "data"


def test_damaged_data_and_too_small_a_vocabulary_fail(prepared: Path, tmp_path: Path) -> None:
    (found,) = checks.data(config_of(tmp_path, f"data.path={prepared}", "model.vocab_size=100"))
    assert found.level is Level.FAIL
    assert "model.vocab_size is 100" in found.found
    damaged = tmp_path / "damaged"
    shutil.copytree(prepared, damaged)
    with (damaged / "train.bin").open("ab") as file:
        file.truncate(4)
    (found,) = checks.data(config_of(tmp_path, f"data.path={damaged}"))
    assert found.level is Level.FAIL
    assert "train.bin" in found.found


def test_too_little_data_for_a_run(prepared: Path, tmp_path: Path) -> None:
    """The sample text is 10 MB, which the 80B preset would read 200,000 times."""
    *_, found = checks.data(compose(["experiment=paper_80b_a3b_32k"]))
    assert found.level is Level.WARN
    number = re.search(r"500,002,979,840 tokens read it about ([\d,]+) times", found.found)
    assert number
    assert int(number[1].replace(",", "")) > 20_000
    *_, found = checks.data(compose(["experiment=quickstart"]))
    assert found.level is Level.OK
    own = ["train.steps=100", "train.global_batch_size=8", "train.seq_length=64"]
    tokens = load_prepared(prepared, check_tokens=False).train_tokens
    *_, found = checks.data(config_of(tmp_path, f"data.path={prepared}", *own))
    assert f"51,200 tokens read it about {51200 / tokens:.0f} times" in found.found
    # Of a blend the part that is read most often counts.
    blend = f"data.blend='3 {prepared}; 1 {prepared}'"
    *_, found = checks.data(config_of(tmp_path, blend, *own))
    assert f"about {0.75 * 51200 / tokens:.0f} times" in found.found


def test_large_raw_text_gets_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("words " * 1000)
    found, _ = checks.data(config_of(tmp_path, f"data.path={text}"))
    assert found.level is Level.OK
    monkeypatch.setattr(checks, "_LARGE_TEXT", 1000)
    found, _ = checks.data(config_of(tmp_path, f"data.path={text}"))
    assert found.level is Level.WARN
    assert "hysparse prepare-data" in found.fix


@pytest.mark.parametrize(
    ("checkpoints", "level"), [(0.5, Level.FAIL), (3.5, Level.WARN), (4.5, Level.OK)]
)
def test_room_for_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: float, level: Level
) -> None:
    """checkpoint.keep=3 needs room for four: the new one comes before the oldest goes."""
    config = config_of(tmp_path, "checkpoint.keep=3")
    overview = overview_of(config, 1)
    free = int(checkpoints * overview.checkpoint_bytes)
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage)
    (found,) = checks.disk(config, overview)
    assert found.level is level


def test_a_locked_run_directory_fails_and_stays_as_it_was(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config.run_path.mkdir()
    (found,) = checks.run_directory(config)
    assert found.level is Level.OK
    assert list(config.run_path.iterdir()) == []
    held, _ = lock(config.run_path)
    with held:
        (found,) = checks.run_directory(config)
    assert found.level is Level.FAIL
    assert f"process {os.getpid()} on {socket.gethostname()}" in found.found
    (found,) = checks.run_directory(config)
    assert found.level is Level.OK


def test_a_tracker_without_key_gets_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (found,) = checks.tracker(config_of(tmp_path, "tracking=wandb_online"))
    assert found.level is Level.WARN
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    (found,) = checks.tracker(config_of(tmp_path, "tracking=wandb_online"))
    assert found.level is Level.OK


def test_findings_of_machines_are_merged_and_named() -> None:
    good = Finding(Level.OK, "data", "whole")
    bad = Finding(Level.FAIL, "data", "torn", "restore it")
    everybody = [{"host": f"n{number}", "own": [good]} for number in range(4)]
    everybody[1]["own"] = everybody[3]["own"] = [bad]
    found = list(_merged(everybody))
    assert found == [good, Finding(Level.FAIL, "data", "torn (on n1, n3)", "restore it")]
    assert has_failed(found)
    assert "FAIL  data          torn (on n1, n3)\n      data          restore it" in as_text(found)


def test_a_rank_that_differs_is_named() -> None:
    everybody = [{"host": f"n{rank // 2}", "own": [], "code": "abc"} for rank in range(4)]
    assert only(list(_same_everywhere(everybody)), "code").level is Level.OK
    everybody[3]["code"] = "def"
    found = only(list(_same_everywhere(everybody)), "code")
    assert found.level is Level.FAIL
    assert found.found == "rank 3 on n1 has def, rank 0 on n0 has abc"
