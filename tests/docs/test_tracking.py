"""docs/tracking.md names every field and setting there is, and shows commands that work."""

import dataclasses
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hysparse_megatron.config.cli import load, parse_arguments
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.debug import ProfileTool
from hysparse_megatron.config.describe import type_of
from hysparse_megatron.config.schema import TrackingConfig
from hysparse_megatron.config.validate import validate
from hysparse_megatron.model import experts
from hysparse_megatron.model.probe import NUM_QUERIES, QUANTITIES
from hysparse_megatron.runtime import faults, flight_recorder, memory_history, step_profile
from hysparse_megatron.source import DIFF_FILE, MAX_DIFF_BYTES
from hysparse_megatron.tracking import selections, tensorboard
from hysparse_megatron.tracking.meter import Meter
from hysparse_megatron.tracking.metrics import MEASURED
from tests.unit.single_process import default_group
from tools import compare_runs, report

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "tracking.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"`([^`\n]+)`", TEXT)
COMMANDS = re.findall(r"^    (\S.*)$", TEXT, flags=re.M)


def test_all_settings_are_told() -> None:
    named = {name for name in QUOTED if name.startswith("tracking.")}
    named = {re.split(r"[=\s]", name)[0] for name in named}
    assert named == {f"tracking.{field.name}" for field in dataclasses.fields(TrackingConfig)}
    for name in QUOTED:
        if re.fullmatch(r"(parallel|cluster|debug)\.[\w.]+", name):
            assert type_of(name) is not None, name


def test_all_fields_are_told() -> None:
    clock: Any = SimpleNamespace(take=lambda: 0.1)
    config = compose(["tracking.straggler_interval=2"])
    with default_group():
        meter = Meter(
            config, 100, clock, torch.device("cpu"), stage=0, restarts=0, log=lambda text: None
        )
        rows = [meter.measure(step, 3000, 1.0, 0.01) for step in (1, 2)]
    source = Path(experts.__file__).read_text()
    loads = set(re.findall(r"\bmoe_(?:\w+_load|idle_experts|balance_loss|z_loss)\b", source))
    # What the loop writes itself is checked by tests of the loop.
    own = set(re.findall(r'"(\w+)": ', (ROOT / "hysparse_megatron/training/loop.py").read_text()))
    fields = {*rows[0], *rows[1], *MEASURED, *QUANTITIES, *loads, *own}
    fields -= {"guard", "evaluation_due", "position"}  # facts of checkpoints
    assert len(fields) > 30
    assert fields - set(QUOTED) == set()


def test_numbers_are_those_of_the_code() -> None:
    assert f"last {flight_recorder.BUFFER_ENTRIES:,} collectives" in TEXT
    assert f"at {NUM_QUERIES} queries" in TEXT
    assert f"last {memory_history.MAX_ENTRIES:,} allocations" in TEXT
    assert f"`{step_profile.FOLDER}/rank0-steps-20-to-22.json.gz`" in TEXT
    assert f"`{memory_history.FOLDER}/rank0.pickle`" in TEXT
    assert f"cut at {MAX_DIFF_BYTES // 1_000_000} MB" in TEXT
    for name in (
        DIFF_FILE,
        selections.SELECTIONS_FILE,
        f"{tensorboard.FOLDER}/",
        f"{flight_recorder.LOG_FOLDER}/{flight_recorder.FILE_PREFIX}*",
    ):
        assert name in QUOTED, name
    environment: dict[str, str] = {}
    flight_recorder.set_defaults(Path("run"), environment)
    assert set(environment) <= set(QUOTED)


def test_named_files_and_faults_exist() -> None:
    for name in QUOTED:
        if name.endswith(".py"):
            assert (ROOT / name).exists(), name
        if name.startswith("HYSPARSE_FAULT="):
            (fault,) = faults.parse(name.partition("=")[2].strip('"'))
            assert fault.kind == "slow"


def test_shown_commands_are_valid(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = 0
    for line in COMMANDS:
        words = shlex.split(line)
        if words[0] == "make":
            arguments = shlex.split(next(w for w in words if w.startswith("ARGS="))[5:])
            config = load(parse_arguments(["experiment=quickstart", *arguments]))
            assert validate(config, world_size=4) == []
        elif words[0] == "nsys":
            ranks, *arguments = words[words.index("--nproc") + 1 :]
            config = load(parse_arguments(arguments))
            assert config.debug.profile.tool is ProfileTool.nsys
            assert validate(config, world_size=int(ranks)) == []
        elif words[:2] == ["hysparse", "report"]:
            monkeypatch.setattr(report, "load_run", lambda path: None)
            monkeypatch.setattr(report, "write_report", lambda run, path: None)
            monkeypatch.setattr(report, "require_writable", lambda path, option: None)
            assert report.main(words[2:]) == 0
        elif words[:2] == ["hysparse", "compare"]:
            assert len(compare_runs._parse(words[2:]).runs) >= 2
        else:
            assert line.startswith((".venv/bin/torchfrtrace", "WARNING: rank 117"))
            continue
        seen += 1
    assert seen == 7
    capsys.readouterr()
