"""Selections captured from a finished run, for the benchmarks."""

from pathlib import Path

import pytest
import torch
from hysparse_kernels.benchmarking.selections import Captured
from run_commands import FinishedRun, run


@pytest.mark.thorough
def test_the_selections_of_every_oracle_are_saved(finished: FinishedRun, tmp_path: Path) -> None:
    output = tmp_path / "selected.npz"
    words = ["capture-selections", str(output), "--run", str(finished.run_dir)]
    run(words, entry=("-m", "hysparse_megatron.main"))
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
