"""docs/recipes.md says what the planner says of presets that compose, are valid and fit."""

import re

import pytest

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.validate import validate
from hysparse_megatron.plan.report import as_values
from hysparse_megatron.plan.suggest import check, overview_of
from tests.docs.blocks import ROOT

TEXT = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(recipe_\w+)` \| (\d+) \| (.*) \|$", TEXT, flags=re.M)


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
