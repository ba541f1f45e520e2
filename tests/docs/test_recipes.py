"""docs/recipes.md says what the planner says of presets that compose, are valid and fit."""

import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
import yaml

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.frozen import to_yaml
from hysparse_megatron.config.validate import validate
from hysparse_megatron.plan.report import as_values
from hysparse_megatron.plan.suggest import check, overview_of
from tests.docs.blocks import ROOT
from tools.compare_runs import main as compare_runs
from tools.run_data import RunData, flat, load_run
from tools.study.corpus import Recipe

TEXT = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(recipe_\w+)` \| (\d+) \| (.*) \|$", TEXT, flags=re.M)
RESULTS = ROOT / "tools" / "recipe_results"
ON_A_DAY = "????-??-??-h200-"
RUN_TO = {"recipe_160m": 99, "recipe_1b": 6, "recipe_1b_moe": 11}
OF_THAT_RUN = (
    *("name", "run_dir", "data.path"),
    *("train.eval_interval", "train.eval_batches", "train.deadline_minutes"),
)


def recorded(name: str) -> Path:
    """The one recorded run of that name, whatever its day."""
    [found] = RESULTS.glob(ON_A_DAY + name)
    return found


AGAIN = recorded("recipe_160m-again")


def losses(run: RunData) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in run.steps}


def section(name: str) -> str:
    """What the page says of the recorded run."""
    [found] = [part for part in TEXT.split("\n## ") if f"`{name}`\n" in part[:60]]
    return found


def test_every_recorded_run_has_a_section() -> None:
    folders = {path for path in RESULTS.iterdir() if path.is_dir()}
    assert folders == {*map(recorded, RUN_TO), AGAIN}


def test_every_recipe_has_a_row() -> None:
    presets = {path.stem for path in (ROOT / "conf" / "experiment").glob("recipe_*.yaml")}
    assert {name for name, _, _ in ROWS} == presets
    assert len(ROWS) == len(presets) >= 4


@pytest.mark.parametrize(("name", "gpus", "figures"), ROWS, ids=[row[0] for row in ROWS])
def test_rows_are_what_the_planner_says(name: str, gpus: str, figures: str) -> None:
    config = compose([f"experiment={name}"])
    assert validate(config, world_size=int(gpus)) == []
    check(config, int(gpus))
    plan = as_values(overview_of(config, int(gpus)))
    train, seconds = config.train, plan["step"]["seconds"]
    assert plan["fits"]
    assert plan["peak_bytes"] < 0.9 * config.cluster.memory_gib * 2**30
    assert config.optim.warmup_steps < train.steps / 10
    assert figures.split(" | ") == [
        f"{plan['parameters']['total']:,}",
        f"{plan['parameters']['active']:,}",
        f"{train.tokens / 1e9:.1f} billion",
        f"{train.global_batch_size} x {train.seq_length:,} tokens",
        f"{plan['peak_bytes'] / 2**30:.1f} GiB",
        f"{seconds:.1f} s",
        f"{seconds * train.steps / 3600:,.0f} hours",
        f"{plan['checkpoint_bytes'] / 1e9:.1f} GB",
    ]


@pytest.mark.parametrize("name", RUN_TO)
def test_the_recorded_run_is_of_the_recipe(name: str) -> None:
    ran = dict(flat(load_run(recorded(name)).config))
    today = dict(flat(yaml.safe_load(to_yaml(compose([f"experiment={name}"])))))
    compared = (ran.keys() & today.keys()) - set(OF_THAT_RUN)
    assert len(compared) > 50
    assert {key: ran[key] for key in compared} == {key: today[key] for key in compared}


@pytest.mark.parametrize("name", RUN_TO)
def test_the_curve_is_that_of_the_recorded_run(name: str) -> None:
    run, text = load_run(recorded(name)), section(name)
    columns = [losses(run), *([losses(load_run(AGAIN))] if name in AGAIN.name else [])]
    tokens = {row["step"]: row["tokens"] / 1e6 for row in run.steps}
    shown = [int(step) for step in re.findall(r"^\| (\d+) \| [\d.]+ million \|", text, flags=re.M)]
    assert len(shown) >= 6
    assert shown[-1] == max(columns[0]) == RUN_TO[name]
    for step in shown:
        cells = " | ".join(f"{column[step]:.4f}" for column in columns)
        assert f"| {step} | {tokens[step]:.1f} million | {cells} |" in text


def test_held_out_losses_are_those_of_the_recorded_runs() -> None:
    run, again = load_run(recorded("recipe_160m")), load_run(AGAIN)
    [start, end] = [row["eval_loss"] for row in run.evaluations]
    [repeated] = [row["eval_loss"] for row in again.evaluations if row["step"] == 50]
    assert (
        f"{start:.4f} before the first step, {end:.4f} after step 50, {repeated:.4f} when" in TEXT
    )


@pytest.mark.parametrize("name", RUN_TO)
def test_speed_and_memory_are_those_of_the_recorded_run(name: str) -> None:
    steps, text = load_run(recorded(name)).steps, section(name)
    config = compose([f"experiment={name}"])
    median = {
        key: statistics.median(row[key] for row in steps)
        for key in ("tokens_per_second", "step_seconds", "mfu")
    }
    hours = median["step_seconds"] * config.train.steps / 3600
    assert (
        f"{median['tokens_per_second']:,.0f} tokens/s, {median['step_seconds']:.2f} s a step, "
        f"{median['mfu']:.1%} of".replace("%", " %")
        in text
    )
    assert f"{hours:.1f} hours for the" in text
    assert f"The first step takes {steps[0]['step_seconds']:.1f} s" in text
    peak = max(row["peak_memory_bytes"] for row in steps)
    memory = overview_of(config, 1).ranks[0].memory
    tensors = memory.total - memory.runtime
    assert (
        f"Memory: {peak / 2**30:.1f} GiB in tensors at most, where the plan says "
        f"{tensors / 2**30:.1f} GiB and {memory.runtime / 2**30:.1f} GiB for CUDA" in text
    )
    # The plan gives every expert the same number of tokens.
    assert peak == pytest.approx(tensors, rel=0.02 if config.model.moe.num_experts else 0.01)


def test_another_start_is_within_what_the_page_asks_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    [command] = re.findall(r"^    hysparse compare (.*)$", TEXT, flags=re.M)
    first, _, *options = shlex.split(command)
    assert ROOT / first == recorded("recipe_160m")
    assert compare_runs([str(ROOT / first), str(AGAIN), *options]) == 0
    [furthest] = re.findall(r"at most (\S+)%, at step", capsys.readouterr().out)
    assert f"never further apart than {furthest} %" in TEXT.replace("\n", " ")


def test_the_text_is_told() -> None:
    text = json.loads(recorded("text.json").read_text())
    assert f"begins with `{text['fingerprint']}`" in TEXT
    sources = Recipe.read(ROOT / "tools" / "study" / "recipe.yaml").sources
    projects = [name for source in sources for name in source.projects]
    assert set(text["debian_packages"]) == {"linux-source-6.1", *projects}
