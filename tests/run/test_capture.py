"""Selections captured from a finished run, for the benchmarks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.selections import Captured
from conftest import FinishedRun
from run_commands import ROOT


@pytest.mark.thorough
def test_the_selections_of_every_oracle_are_saved(finished: FinishedRun, tmp_path: Path) -> None:
    output = tmp_path / "picks.npz"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = ["-m", "benchmarks.capture", str(output), "--run", str(finished.run_dir)]
    result = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    captured = Captured.load(output)
    facts = captured.facts
    assert facts["steps"] == 40
    assert 0 < facts["loss"] < 10
    assert set(facts["statistics"]) == {
        *(f"layer {layer}" for layer in captured.layers),
        "random",
        "clustered",
    }
    assert captured.layers
    token = torch.arange(facts["sequence"])[:, None]
    for indices in captured.layers.values():
        assert indices.shape[1:] == (facts["sequence"], facts["num_selected"])
        assert ((indices >= -1) & (indices * facts["block_size"] <= token)).all()
        assert (indices[..., 0] >= 0).all()
