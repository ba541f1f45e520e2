"""What the run directory is told of a run's end."""

from pathlib import Path

from hysparse_megatron.config.compose import compose
from hysparse_megatron.training.outcome import write_finish
from tests.unit.tracking.metric_rows import run_directory


def test_a_finished_run_stays_finished_whatever_became_of_its_presets(tmp_path: Path) -> None:
    """They may have been edited while it ran."""
    config = compose(["name=mine", "train.steps=3", f"run_dir={tmp_path / 'run'}"])
    states: list[str] = []
    directory = run_directory(config.run_path)
    directory.write_status = lambda state, **facts: states.append(state)
    directory.metrics.touch()
    told: list[str] = []
    write_finish(config, directory, "tokenizer.json", 1, ["experiment=gone"], told.append)
    assert states == ["finished"]
    assert told[0].startswith("WARNING: no summary.md: ConfigError: ")
