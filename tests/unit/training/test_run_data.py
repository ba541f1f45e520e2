"""What a run reads, beyond what data.sources finds."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import DataConfig
from hysparse_megatron.training.run_data import prepare_data
from tests.run.run_commands import write_text


def test_runs_of_any_seed_hold_out_the_same(groups: ProcessGroupCollection, tmp_path: Path) -> None:
    """Or weights of one run have trained on what another, which starts from them, is judged by."""
    text = write_text(tmp_path / "text", 3)
    data = DataConfig(path=str(text), cache_dir=str(tmp_path / "cache"), validation_fraction=0.3)
    watch: Any = SimpleNamespace(attend=lambda action: action())
    rank: Any = SimpleNamespace(local_rank=0)
    found = [
        prepare_data(
            replace(compose([f"train.seed={seed}"]), data=data), rank, watch, lambda line: None
        )[0]
        for seed in (1, 2)
    ]
    assert found[0] == found[1]
