"""The table of docs/models.md says what the planner says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = re.findall(
    r"^\| `(\w+)` \| `([^`]+)` \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) GB \| ([\d.]+) GB \|$",
    (ROOT / "docs" / "models.md").read_text(encoding="utf-8"),
    flags=re.M,
)


def test_all_six_models_are_there() -> None:
    kinds = ("hysparse", "hybrid_swa", "full")
    assert [row[0] for row in ROWS] == [f"{k}_{size}" for size in ("7b", "80b_a3b") for k in kinds]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_rows_are_what_the_planner_says(row: tuple[str, ...]) -> None:
    model, layout, total, active, short, long = row
    result = subprocess.run(
        [sys.executable, "-m", "tools.plan", "--json", f"model={model}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    plan = json.loads(result.stdout)
    assert plan["layout"] == layout
    assert f"{plan['parameters']['total']:,}" == total
    assert f"{plan['parameters']['active']:,}" == active
    caches = {entry["context_length"]: entry["bytes"] for entry in plan["kv_cache"]}
    assert f"{caches[32768] / 1e9:.2f}" == short
    assert f"{caches[1048576] / 1e9:.1f}" == long
