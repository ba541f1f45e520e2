"""The tables of docs/models.md say what the planner says."""

import json
import re
import sys
from pathlib import Path

import pytest

from hysparse_megatron.config.compose import compose
from hysparse_megatron.plan.memory import GIB
from hysparse_megatron.plan.suggest import overview_of
from tests.captured import captured

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
ROWS = re.findall(
    r"^\| `(\w+)` \| `([^`]+)` \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) GB \| ([\d.]+) GB \|$",
    PAGE,
    flags=re.M,
)
PLANS = re.findall(
    r"^\| (none|`[^`]+`) \| ([\d.]+) GiB \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \|$",
    PAGE,
    flags=re.M,
)


def test_all_six_models_are_there() -> None:
    kinds = ("hysparse", "hybrid_swa", "full")
    assert [row[0] for row in ROWS] == [f"{k}_{size}" for size in ("7b", "80b_a3b") for k in kinds]


@pytest.mark.thorough
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_rows_are_what_the_planner_says(row: tuple[str, ...]) -> None:
    model, layout, total, active, short, long = row
    result = captured([sys.executable, "-m", "tools.plan", "--json", f"model={model}"], cwd=ROOT)
    plan = json.loads(result.stdout)
    assert plan["layout"] == layout
    assert f"{plan['parameters']['total']:,}" == total
    assert f"{plan['parameters']['active']:,}" == active
    caches = {entry["context_length"]: entry["bytes"] for entry in plan["kv_cache"]}
    assert f"{caches[32768] / 1e9:.2f}" == short
    assert f"{caches[1048576] / 1e9:.1f}" == long


def test_plans_are_what_the_planner_says_and_fit() -> None:
    assert len(PLANS) == 3
    for settings, memory, *sent in PLANS:
        added = [] if settings == "none" else settings.strip("`").split()
        planned = overview_of(compose(["experiment=paper_80b_a3b_32k", *added]), 128)
        assert planned.peak_bytes < 79 * GIB
        assert f"{planned.peak_bytes / GIB:.1f}" == memory
        for kind, bytes_sent in zip(("tensor", "expert", "context"), sent, strict=True):
            most = max(getattr(rank.traffic, f"{kind}_bytes") for rank in planned.ranks)
            assert f"{most / 1e9:.2f}" == bytes_sent
