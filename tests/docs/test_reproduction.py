"""docs/reproduction.md says what the results of the studies say, and its commands are valid."""

import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import pytest

from tools.prepare_data import _parser as prepare_parser
from tools.study.__main__ import _parser
from tools.study.plan import read_study
from tools.study.results import Result, read_result
from tools.study.table import lookup

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "tools" / "study"
TEXT = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")


def finished(name: str) -> dict[str, Result]:
    """The results of a study by run."""
    study = read_study(STUDY / f"{name}.yaml")
    found = {run.name: read_result(STUDY / "results" / study.name, run) for run in study.runs}
    return {run: result for run, result in found.items() if result}


@pytest.mark.thorough
def test_losses_and_counts_are_those_of_the_results() -> None:
    done, claims = finished("ablations"), finished("claims")
    word = {6: "six"}[len(done) + len(claims)]
    total = sum(len(read_study(STUDY / f"{name}.yaml").runs) for name in ("ablations", "claims"))
    assert f"**{word} of its {total} runs are finished**" in TEXT.replace("\n", " ")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"has begun, {word} of its runs are finished" in readme
    shown = [done[f"{name}-seed1"] for name in ("full", "hysparse", "windows")]
    rows = [[result.rows[-1]["eval_loss"] for result in shown]]
    for where in ("code.loss.0.all.loss", "prose.loss.0.all.loss"):
        rows.append([lookup(result.evaluations, where) for result in shown])
    for row in rows:
        assert f"| {' | '.join(f'{loss:.4f}' for loss in row)} |" in TEXT
    hours = sum(result.seconds for result in done.values()) / 3600
    assert f"({hours:.2f} hours for all three)" in TEXT


@pytest.mark.thorough
def test_the_runs_of_the_claims_are_as_told() -> None:
    done = finished("claims")
    losses = {
        run: {row["step"]: row["eval_loss"] for row in result.rows if "eval_loss" in row}
        for run, result in done.items()
    }
    [header] = re.findall(r"^\| loss on .*, by steps of ([\d,]+) \| (.*) \|$", TEXT, flags=re.M)
    num_steps, *shown = (
        int(step.replace(",", "")) for step in [header[0], *header[1].split(" | ")]
    )
    assert list(done) == ["full-seed1", "hysparse_1_3-seed1", "windows_1_3-seed1"]
    full, ours, windows = losses.values()
    assert shown[-1] == num_steps == max(full) == max(ours) == max(windows)
    recall: dict[str, list[str]] = {}
    by_place: dict[str, dict[str, list[float]]] = {"code": {}, "prose": {}}
    layouts = ("full", "HySparse 1:3", "windows 1:3")
    for (run, result), layout in zip(done.items(), layouts, strict=True):
        assert f"| {layout} | {' | '.join(f'{losses[run][step]:.4f}' for step in shown)} |" in TEXT
        for text in ("code", "prose"):
            places = ("all", "bins.0", "bins.15")
            found = [lookup(result.evaluations, f"{text}.loss.0.{place}.loss") for place in places]
            told = " | ".join(f"{loss:.4f}" for loss in found)
            assert f"| {text} | {layout} | {told} |" in TEXT
            by_place[text][layout] = found
        for place, task in enumerate(("needle", "multi-key needle", "variable tracking")):
            for length in (0, 1):
                where = f"recall.scores.{2 * place + length}.mean"
                mean = lookup(result.evaluations, where)
                recall.setdefault(task, []).append(f"{mean * 100:.0f} %")
    for task, means in recall.items():
        assert f"| {task} | {' | '.join(means)} |" in TEXT
    text = re.sub(r"\s+", " ", TEXT)
    (_, *code), (_, *prose) = (
        [round(a - b, 2) for a, b in zip(found["full"], found["HySparse 1:3"], strict=True)]
        for found in by_place.values()
    )
    (seen, first, last), (prose_seen, *_) = (
        [b - a for a, b in zip(found["HySparse 1:3"], found["windows 1:3"], strict=True)]
        for found in by_place.values()
    )
    behind = windows[num_steps] - ours[num_steps]
    told = f"end {behind:.2f} nats above it on the validation split, {seen:.2f} on unseen code and"
    assert f"{told} {prose_seen:.2f} on prose" in text
    assert f"(on code {first:.3f} within the first 512, {last:.3f} within the last)" in text
    assert f"{full[num_steps] - windows[num_steps]:.2f} below full attention and" in text
    assert f"it is {code[0]} on code and {prose[0]} on prose" in text
    assert f"within the last 512 {code[1]} and {prose[1]}" in text
    gaps = [f"{full[step] - ours[step]:.2f}" for step in shown if step >= 800]
    assert f"{', '.join(gaps[:-1])} and {gaps[-1]} nats from step 800 on" in text
    assert f"loss is {ours[600]:.2f} at step 600, that of full attention {full[600]:.2f}" in text
    hours = listed(f"{result.seconds / 3600:.2f}" for result in done.values())
    speeds = listed(f"{result.tokens_per_second:,.0f}" for result in done.values())
    assert f"({hours} hours, {speeds} tokens a second" in text


def listed(words: Iterable[str]) -> str:
    """As a sentence lists them."""
    *first, last = words
    return f"{', '.join(first)} and {last}"


def test_the_unfinished_runs_are_as_told() -> None:
    folder = STUDY / "results" / "claims_92m" / "unfinished"
    gated, windows, diverged = (
        json.loads((folder / f"{run}.json").read_text())
        for run in ("full_gated-seed1", "windows_1_3-seed2", "windows_1_3-seed1-diverged")
    )
    shown = (200, 400, 800, 1200, 1600, 2000, 2289)
    for run, layout in ((gated, "full, gated output"), (windows, "windows 1:3, seed 2")):
        losses = {
            row["step"]: f"{row['eval_loss']:.4f}" for row in run["rows"] if "eval_loss" in row
        }
        told = " | ".join(losses.get(step, "-") for step in shown)
        assert f"| {layout} (unfinished) | {told} |" in TEXT
    found = [
        lookup(gated["evaluations"], f"prose.loss.0.{place}.loss")
        for place in ("all", "bins.0", "bins.15")
    ]
    text = re.sub(r"\s+", " ", TEXT)
    assert (
        "({:.4f} on all positions, {:.4f} on the first 512, {:.4f} on the last)".format(*found)
        in text
    )
    done = finished("claims")
    full, ours = (done[f"{run}-seed1"] for run in ("full", "hysparse_1_3"))
    ends = [run.rows[-1]["eval_loss"] - gated["rows"][-1]["eval_loss"] for run in (full, ours)]
    assert f"ends {ends[0]:.2f} nats below itself without and {-ends[1]:.2f} above HySparse" in text
    prose = [lookup(run.evaluations, "prose.loss.0.all.loss") - found[0] for run in (full, ours)]
    assert f"on prose {prose[0]:.2f} below and {-prose[1]:.2f} above" in text
    for place in ("code", "prose"):
        at_places = [
            lookup(windows["evaluations"], f"{place}.loss.0.{part}.loss")
            for part in ("all", "bins.0", "bins.15")
        ]
        told = " | ".join(f"{loss:.4f}" for loss in at_places)
        assert f"| {place} | windows 1:3, seed 2 | {told} |" in TEXT
    [skipped] = [row for row in windows["rows"] if row.get("skipped")]
    told = f"one such step, {skipped['step']:,} with a norm of {skipped['grad_norm']:.2f}"
    assert told in text
    norms = {row["step"]: row["grad_norm"] for row in diverged["rows"] if "grad_norm" in row}
    told = "over {:.1f}, {:.1f} and {:.0f} to {:,.0f}".format(
        *(norms[step] for step in (1553, 1556, 1561, 1564))
    )
    assert told in text
    assert f"after step {max(norms):,}" in text


@pytest.mark.thorough
def test_what_its_layers_do_is_as_told() -> None:
    result = finished("claims")["hysparse_1_3-seed1"]
    evaluated = {row["step"]: row for row in result.rows if "eval_loss" in row}
    last, early = evaluated[2289], evaluated[200]
    masses = [last[f"oracle_mass/layer_{layer:03}"] for layer in (4, 8, 0)]
    agreed = [last[f"neighbour_agreement/layer_{layer:03}"] * 100 for layer in (0, 4, 8)]
    text = re.sub(r"\s+", " ", TEXT)
    assert "({:.2f} and {:.2f} of it), the first one {:.2f}".format(*masses) in text
    assert "agree on {:.0f}, {:.0f} and {:.0f} % of".format(*agreed) in text
    spans = {}
    for when, row in (("last", last), ("early", early)):
        for gate in ("sparse", "window"):
            values = [row[f"{gate}_gate/layer_{layer:03}"] for layer in (5, 6, 7, 9, 10, 11)]
            spans[when, gate] = f"{min(values):.2f} to {max(values):.2f}"
    assert f"they let {spans['last', 'sparse']} of the sparse branch through" in text
    assert f"of the window {spans['last', 'window']}." in text
    assert f"it was {spans['early', 'sparse']}, and {spans['early', 'window']}." in text


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
