"""`tools.benchmark_decode`: what it measures of a small model on a CPU, and mistakes."""

import json
from pathlib import Path

import pytest

from tests.captured import Call
from tools.benchmark_decode import main

SMALL = [
    "--device", "cpu", "--vocab", "64", "--steps", "2", "--model", "tiny_hysparse",
    "--set", "model.hidden_size=32", "model.head_dim=8", "model.window=8",
    "model.layout=F 3*S W F", "model.block_size=8",
]  # fmt: skip


@pytest.mark.thorough
def test_caches_are_measured_and_compared(tmp_path: Path) -> None:
    output = tmp_path / "decode.txt"
    options = ["--lengths", "20,90", "--batches", "1,3", "--output", str(output)]
    assert main([*SMALL, *options]) == 0
    found = json.loads(output.with_suffix(".json").read_text())["rows"]
    assert [(row["layout"], row["length"], row["batch"]) for row in found] == [
        (layout, length, batch)
        for layout in ("hysparse", "swa", "full")
        for length in (20, 90)
        for batch in (1, 3)
    ]
    per_token = 2 * 2 * 8 * 4  # key and value of 2 groups of 8 channels in fp32
    for row in found:
        tokens = row["length"] + 2 + 2  # and its steps
        full = 6 if row["layout"] == "full" else 2
        assert row["cache_bytes"] == row["planned_bytes"]
        assert row["cache_bytes"] == row["batch"] * per_token * (full * tokens + (6 - full) * 8)
        assert row["eager_seconds"] > 0
        assert "graph_seconds" not in row
    text = output.read_text()
    assert "hysparse: F 3*S W F, hidden 32" in text
    assert "full: F 3*F F F, hidden 32" in text
    assert f"full / hysparse {6 * 94 / (2 * 94 + 4 * 8):.2f}; tokens/s" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nothing"], "model"),
        (["--device", "cpu", "--set", "model.hiden_size=3"], "hiden_size"),
        (["--layouts", "half"], "got half; allowed some of hysparse,swa,full"),
        (["--batches", "1,all"], "got all; allowed a whole number from 1"),
        (["--device", "cpu", "--output", "table.md"], "allowed a file that ends in .txt"),
    ],
)
def test_mistakes_end_with_2(arguments: list[str], message: str, call: Call) -> None:
    assert message in call(main, arguments, code=2).err
