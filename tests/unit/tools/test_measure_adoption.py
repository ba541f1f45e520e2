"""`tools.measure_adoption` on the smallest models: what it trains, and how it counts."""

import json
from pathlib import Path

import pytest

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.config.frozen import load_frozen
from hysparse_megatron.runtime.faults import VARIABLE
from hysparse_megatron.tracking.metrics import read_metrics
from tests.captured import Call
from tools.measure_adoption import main

SMALL = ["--layers", "3", "--full-layers", "2", "--length", "64", "--original-steps", "4"]
SHORT = ["--steps", "3", "--decay", "1", "--sequences", "2", "--held-out", "4"]


@pytest.mark.thorough
@pytest.mark.usefixtures("forks_for_commands")
def test_shares_are_of_the_losses_of_the_two_runs(tmp_path: Path, call: Call) -> None:
    output, folder = tmp_path / "adoption.json", tmp_path / "kept"
    kept = ["--output", str(output), "--folder", str(folder)]
    told = call(main, [*SMALL, *SHORT, *kept, "--seeds", "7"]).out
    [row] = json.loads(output.read_text())["seeds"]
    assert row["seed"] == 7

    configs = {}
    for name in ("full", "adopted", "random"):
        run = folder / "seed-7" / f"{name}-run"
        rows = [row for row in read_metrics(run / "metrics.jsonl") if "eval_loss" in row]
        configs[name] = load_frozen(run / "config.yaml")
        losses = [rows[0]["eval_loss"], rows[-1]["eval_loss"]]
        assert [rows[0]["step"], rows[-1]["step"]] == [0, 3]
        if name == "random":
            assert losses[-1] == row["random_trained"]
            assert configs[name].checkpoint.load is None
            continue
        of_name = "original" if name == "full" else "adopted"
        assert losses == [row[of_name], row[f"{of_name}_trained_on"]]
    # The same data, split, order and schedule; layers alone differ.
    full, adopted = configs["full"], configs["adopted"]
    assert (full.train, full.optim) == (adopted.train, adopted.optim)
    random = configs["random"]
    assert (random.train, random.optim, random.model) == (
        adopted.train, adopted.optim, adopted.model,
    )  # fmt: skip
    assert full.train.seed == 7
    kinds = parse_layout(adopted.model.layout).kinds
    assert [kinds.count(kind) for kind in (LayerKind.FULL, LayerKind.SPARSE)] == [2, 1]
    assert parse_layout(row["layout"]).layers == parse_layout(adopted.model.layout).layers
    assert set(parse_layout(full.model.layout).kinds) == {LayerKind.FULL}

    gap = row["adopted"] - row["original"]
    left = row["adopted_trained_on"] - row["original_trained_on"]
    if gap <= 0:  # after four steps the window can be the better model
        assert row["of_original"] is row["of_trained_on"] is None
        assert "no gap" in told
    else:
        assert row["of_original"] == (row["adopted"] - row["adopted_trained_on"]) / gap
        assert row["of_trained_on"] == 1 - left / gap
        assert f"of the gap of {gap:.4f} {row['of_original']:.1%} gone" in told
        assert "gap to the original trained on: " in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layout", "F X"], "X"),
        (["--layout", "4*F"], "full layers alone"),
        (["--full-layers", "8"], "--full-layers: got 8; allowed fewer than 8"),
        (["--sequences", "0"], "--sequences: got 0; allowed a whole number from 1"),
        (["--seeds", "1", "2", "1"], "--seeds: one comes twice"),
        (["--output", "no/such/folder/x.json"], "--output: cannot write"),
        (["--steps", "10", "--decay", "10"], "--decay: got 10; allowed less than --steps=10"),
    ],
)
def test_mistakes_end_with_2(arguments: list[str], said: str, call: Call) -> None:
    assert said in call(main, arguments, code=2).err


@pytest.mark.thorough
@pytest.mark.usefixtures("forks_for_commands")
def test_a_command_that_fails_is_shown(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "io_error@0:0:prepare")
    more = ["--folder", str(tmp_path), "--layout", "F S"]
    told = call(main, [*SMALL, *SHORT, *more, "--seeds", "1"], code=5).err
    assert "DataError" in told
    assert "ended with exit code 5: hysparse train --config" in told
    assert "has seed-1 already" in call(main, [*SMALL, *SHORT, *more, "--seeds", "1"], code=2).err
