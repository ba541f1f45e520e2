"""The commands of docs/huggingface.md are understood, and its program runs."""

import re
import shlex
from pathlib import Path

import pytest

from hysparse_megatron.huggingface.adopt import ARCHITECTURES, NEUTRAL_SINK
from hysparse_megatron.huggingface.export import CODE
from hysparse_megatron.huggingface.importing import EXPERIMENT
from tests.unit.huggingface.exports import random_run
from tools import choose_full_layers, measure_adoption
from tools.convert import _parser, main

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    hysparse convert (.*)$", TEXT, flags=re.M)
JOINED = " ".join(TEXT.split())
[PROGRAM] = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str) -> None:
    assert _parser().parse_args(shlex.split(command)).action


def test_commands_of_other_tools_are_understood() -> None:
    [chosen] = re.findall(r"hysparse choose-full-layers (--.*?) It runs the", JOINED)
    args = choose_full_layers._parser().parse_args(shlex.split(chosen))
    assert (str(args.run_dir), args.count) == ("starts/windows", 9)
    [measured] = re.findall(r"`hysparse measure-adoption (.*?)`", JOINED)
    args = measure_adoption._parser().parse_args(shlex.split(measured))
    assert args.seeds == [1, 2, 3]


def test_what_training_brings_back_is_what_was_logged() -> None:
    """The table's rows are those of the log, rounded."""
    log = (ROOT / "tools" / "adoption_results" / "2026-11-26-h100.txt").read_text()
    logged = re.findall(
        r"^seed (\d), (.*): original ([\d.]+), after 100 steps ([\d.]+); adopted ([\d.]+), "
        r"after 100 steps ([\d.]+)(?: \(from .*?\))?; of the gap of ([\d.]+) .* gone, "
        r"([\d.]+)% beside",
        log, flags=re.M,
    )  # fmt: skip
    rows = re.findall(
        r"^\| (\d) \| (?:chosen, )?`(.*)` \| (.*) \| (.*) \| (.*) \| (.*) \| (.*) \| (\d+) % \|$",
        TEXT, flags=re.M,
    )  # fmt: skip
    assert len(rows) == len(logged) == 6
    for row, (seed, layout, was, became, start, end, gap, share) in zip(rows, logged, strict=True):
        assert row[:2] == (seed, layout)
        told = [float(text) for text in row[2:7]]
        assert told == pytest.approx(list(map(float, (was, start, gap, became, end))), abs=6e-4)
        assert float(row[7]) == pytest.approx(float(share), abs=0.6)
    [told] = re.findall(r"random weights come to ([\d.]+), ([\d.]+) and ([\d.]+) in", JOINED)
    of_random = re.findall(r"from random weights ([\d.]+)\)", log)
    assert list(map(float, told)) == pytest.approx(list(map(float, of_random)), abs=6e-4)


def test_every_option_exists() -> None:
    named = set(re.findall(r"`(--[a-z-]+)", TEXT))
    assert {"--checkpoint", "--shard-size", "--window", "--sparse-sink"} <= named
    commands = next(a for a in _parser()._actions if a.choices).choices
    options = {
        name for made in commands.values() for a in made._actions for name in a.option_strings
    }
    assert named <= options


def test_what_is_named_is_so() -> None:
    [listed] = re.findall(r"`model_type` ([a-z0-9, ]+)\)", TEXT)
    assert listed.split(", ") == list(ARCHITECTURES)
    assert all(f"`{name}`" in TEXT for name in (*CODE, EXPERIMENT))
    assert f"start at {NEUTRAL_SINK:.0f}" in TEXT


@pytest.mark.thorough
def test_the_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = random_run(tmp_path / "run", "model.layout=F S W F")
    monkeypatch.chdir(tmp_path)
    tokenizer = ["--tokenizer", str(run / "tokenizer.json")]
    assert main(["export", "--run-dir", str(run), *tokenizer, "exported/quickstart"]) == 0
    found: dict = {}
    exec(PROGRAM, found)
    said = capsys.readouterr().out
    assert "def main():" in said
    assert all(p.grad is not None for p in found["model"].parameters())
    assert main(["import", "exported/tuned", "starts/tuned"]) == 0
