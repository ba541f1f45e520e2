"""What a resumed run may change of its order and learning rate, before anything is written."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hysparse_megatron.compatibility import compared_settings
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.frozen import freeze
from hysparse_megatron.config.schema import Config
from hysparse_megatron.continuation import check_continuation, learning_rate, recorded_settings
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.rundir import RunDirectory, prepare_run
from tests.checkpoints import write_checkpoint

pytestmark = pytest.mark.usefixtures("group")

COSINE = [
    "optim.schedule=cosine",
    "optim.learning_rate=1e-3",
    "optim.min_learning_rate=1e-4",
    "optim.warmup_steps=2",
]
WSD = [*COSINE, "optim.schedule=wsd", "optim.decay_steps=5"]

Start = Callable[..., Config]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """A configuration of the run directory, of 20 steps."""
    return lambda *overrides: replace(composed(*overrides), run_dir=str(tmp_path / "run"))


@functools.cache
def composed(*overrides: str) -> Config:
    return compose(["train.steps=20", *overrides])


def save(config: Config, step: int, facts: dict[str, Any] | None = None) -> Path:
    """A checkpoint without tensors; `facts` are those of its manifest beside step and files."""

    def write(directory: Path) -> None:
        (directory / "__0_0.distcp").write_text("weights")
        (directory / "tensors.json").write_text("{}")

    facts = recorded_settings(config) if facts is None else facts
    facts = {"data": {}, **compared_settings(config), **facts}
    return write_checkpoint(config.run_path / "checkpoints", step, write, facts)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): path.read_bytes() for path in files}


@pytest.mark.parametrize("prepare", [RunDirectory, prepare_run])
@pytest.mark.parametrize("change", ["train.seq_length=256", "train.seed=7"])
def test_another_order_is_refused_and_nothing_changes(
    start: Start, prepare: Callable[[Config], Any], change: str
) -> None:
    freeze(start(), start().run_path)
    save(start(), 8)
    before = contents(start().run_path)
    with pytest.raises(ConfigError, match=rf"{change.split('=')[0]}: .*checkpoint\.load=") as told:
        prepare(start(change))
    assert told.value.exit_code == 2
    assert contents(start().run_path) == before


JUMPS: dict[str, tuple[list[str], int, list[str]]] = {
    "a cosine prolonged": (COSINE, 10, ["train.steps=40"]),
    "a finished cosine prolonged": (COSINE, 20, ["train.steps=40"]),
    "a shorter cosine": (COSINE, 10, ["optim.decay_steps=10"]),
    "a finished decay prolonged": (WSD, 20, ["train.steps=40"]),
    "a decay that should have begun": (WSD, 10, ["optim.decay_steps=15"]),
    "another peak": (WSD, 10, ["optim.learning_rate=2e-3"]),
    "another floor of a cosine": (COSINE, 10, ["optim.min_learning_rate=1e-5"]),
    "another warm-up": (WSD, 1, ["optim.warmup_steps=4"]),
    "another kind": (COSINE, 10, ["optim.schedule=constant"]),
}


@pytest.mark.parametrize("case", JUMPS)
def test_a_jump_of_the_rate_wants_a_yes(start: Start, case: str) -> None:
    settings, step, changes = JUMPS[case]
    save(start(*settings), step)
    changed = start(*settings, *changes)
    # What the run had, and would have had in its next step.
    old = learning_rate(start(*settings), min(step, 19))
    new = learning_rate(changed, step)
    assert abs(old - new) > 1e-6
    told = rf"step {step + 1}, .* would be {new:.6g} in place of {old:.6g} "
    before = contents(changed.run_path)
    for prepare in (RunDirectory, prepare_run):
        with pytest.raises(ConfigError, match=told) as refused:
            prepare(changed)
        assert "optim.accept_schedule_change=true" in str(refused.value)
    assert contents(changed.run_path) == before
    accepted = start(*settings, *changes, "optim.accept_schedule_change=true")
    [warning] = check_continuation(accepted)
    assert f"would be {new:.6g} in place of {old:.6g}" in warning
    assert all(change.partition("=")[0] in warning for change in changes)


OTHERS = ["optim.beta2=0.99", "train.global_batch_size=16"]
NO_JUMPS: dict[str, tuple[list[str], int, list[str]]] = {
    "nothing changed": (COSINE, 10, []),
    "a constant rate prolonged": (["optim.schedule=constant"], 20, ["train.steps=40"]),
    "a decay not yet begun": (WSD, 10, ["train.steps=40"]),
    "a run without a decay prolonged": ([*WSD, "optim.decay_steps=0"], 20, ["train.steps=40"]),
    "in the warm-up": (COSINE, 1, ["train.steps=40"]),
    "a default written out": (COSINE, 10, ["optim.decay_steps=18"]),
    "other settings": (COSINE, 10, [*OTHERS, "train.eval_batches=2"]),
    "nothing left to train": (COSINE, 20, ["optim.learning_rate=2e-3"]),
}


@pytest.mark.parametrize("case", NO_JUMPS)
def test_what_makes_no_jump_is_not_asked_about(start: Start, case: str) -> None:
    settings, step, changes = NO_JUMPS[case]
    save(start(*settings), step)
    assert check_continuation(start(*settings, *changes)) == []


def test_other_held_out_samples_are_warned_of(start: Start) -> None:
    """Their losses would be one curve with those of before."""
    before = start("train.global_batch_size=4", "train.eval_batches=6")
    directory = save(before, 8)
    assert check_continuation(before) == []
    assert check_continuation(start("train.global_batch_size=8", "train.eval_batches=3")) == []
    [warning] = check_continuation(start("train.global_batch_size=8", "train.eval_batches=6"))
    assert f"not compare with those up to {directory} (samples: 24 -> 48); " in warning
    assert warning.endswith("; train.eval_batches=3 keeps the samples")
    masked = start("train.global_batch_size=4", "train.eval_batches=6", "data.document_mask=true")
    [warning] = check_continuation(masked)
    assert warning.endswith("(document_mask: False -> True)")
    assert check_continuation(start("train.global_batch_size=8", "train.eval_batches=0")) == []


def test_a_checkpoint_of_an_early_version_is_compared_with_its_runs_configuration(
    start: Start,
) -> None:
    freeze(start(*COSINE), start().run_path)
    directory = save(start(*COSINE), 10, facts={})
    assert check_continuation(start(*COSINE)) == []
    with pytest.raises(ConfigError, match=r"train\.seq_length: "):
        check_continuation(start(*COSINE, "train.seq_length=256"))
    with pytest.raises(ConfigError, match="learning rate of step 11"):
        check_continuation(start(*COSINE, "train.steps=40"))
    (directory.parents[1] / "config.yaml").unlink()
    assert check_continuation(start(*COSINE, "train.steps=40")) == [], "nobody knows"


def test_settings_of_other_versions_are_no_obstacle(start: Start) -> None:
    settings = recorded_settings(start(*COSINE))["settings"]
    settings["train"]["of_another_version"] = 3
    del settings["optim"]["accept_schedule_change"]
    save(start(*COSINE), 10, facts={"settings": settings})
    assert check_continuation(start(*COSINE)) == []
    with pytest.raises(ConfigError, match="learning rate of step 11"):
        check_continuation(start(*COSINE, "train.steps=40"))


def test_the_checkpoint_that_counts(start: Start) -> None:
    """The one a start goes on from: by `checkpoint.step`, none of another run, no damaged one."""
    save(start(*COSINE), 10)
    save(start(*COSINE, "train.seq_length=256"), 15)
    other = start(*COSINE, "train.seq_length=256")
    assert check_continuation(other) == []
    with pytest.raises(ConfigError, match="step-00000010"):
        check_continuation(start(*COSINE, "train.seq_length=256", "checkpoint.step=10"))
    (start().run_path / "checkpoints" / "step-00000015" / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match="step-00000010"):
        check_continuation(other)
    # The weights alone, in a run of its own: its order begins anew.
    checkpoint = replace(other.checkpoint, load=other.run_dir)
    loading = replace(other, run_dir=f"{other.run_dir}-2", checkpoint=checkpoint)
    assert check_continuation(loading) == []
