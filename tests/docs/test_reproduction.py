"""docs/reproduction.md says what the results of the studies say, and its commands are valid."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tools.prepare_data import _parser as prepare_parser
from tools.study.__main__ import _parser
from tools.study.plan import read_study
from tools.study.results import read_result
from tools.study.table import lookup

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "tools" / "study"
TEXT = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")


@pytest.mark.thorough
def test_losses_and_counts_are_those_of_the_results() -> None:
    study = read_study(STUDY / "ablations.yaml")
    results = STUDY / "results" / study.name
    found = {run.name: read_result(results, run) for run in study.runs}
    done = {name: result for name, result in found.items() if result}
    words = {3: "three"}
    total = len(study.runs) + len(read_study(STUDY / "claims.yaml").runs)
    assert f"**{words[len(done)]} of its {total} runs are finished**" in TEXT.replace("\n", " ")
    shown = [done[f"{name}-seed1"] for name in ("full", "hysparse", "windows")]
    rows = [[result.rows[-1]["eval_loss"] for result in shown]]
    for where in ("code.loss.0.all.loss", "prose.loss.0.all.loss"):
        rows.append([lookup(result.evaluations, where) for result in shown])
    for row in rows:
        assert f"| {' | '.join(f'{loss:.4f}' for loss in row)} |" in TEXT
    hours = sum(result.seconds for result in done.values()) / 3600
    assert f"({hours:.2f} hours for all three)" in TEXT


def test_shown_commands_are_valid() -> None:
    text = TEXT.replace("\\\n", " ")
    commands = re.findall(r"^    hysparse (\S+) (.*)$", text, flags=re.M)
    assert len(commands) == 6
    for tool, line in commands:
        parser = _parser() if tool == "study" else prepare_parser()
        parser.parse_args(shlex.split(line))


def test_the_card_names_what_the_results_were_trained_on() -> None:
    card = json.loads((STUDY / "card.json").read_text())
    assert set(card["parts"]) == {
        "train-000.jsonl.zst",
        "validation-code.jsonl.zst",
        "validation-prose.jsonl.zst",
    }
