"""Every rule refuses what it should, names the key, and none hides another."""

import importlib.metadata
import importlib.util
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from hysparse_megatron.architecture.layers import SinkKind
from hysparse_megatron.architecture.model import Backend
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import Config, OptimizerName, Precision, TrackingMode
from hysparse_megatron.config.validate import check, validate, warnings
from hysparse_megatron.errors import ConfigError
from tests.unit.config.broken_rules import BAD, FP8, INSTANCES, experts, profiled


@pytest.fixture(scope="module")
def base() -> Config:
    # The numbers that the cases below break rules with, whatever the preset is tuned to.
    sizes = ["train.steps=160", "train.global_batch_size=8", "train.micro_batch_size=2"]
    schedule = ["optim.warmup_steps=10", "optim.decay_steps=32"]
    return compose(["experiment=quickstart", *sizes, *schedule])


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_tensorboard_needs_its_package(base: Config, no_packages: None) -> None:
    assert validate(base, world_size=4) == []
    (problem,) = validate(changed(base, {"tracking.tensorboard": True}), world_size=4)
    assert problem.key == "tracking.tensorboard"
    assert "not installed" in problem.got
    assert "pip install tensorboard" in problem.allowed


def test_steps_that_are_profiled(base: Config) -> None:
    settings = profiled(step_range=[1, 160], ranks=[0, 3])
    assert validate(changed(base, settings), world_size=4) == []
    unused = changed(base, profiled(ranks=[7]))
    assert validate(unused, world_size=4) == []


def changed(config: Any, settings: dict[str, Any]) -> Any:
    for key, value in settings.items():
        section, _, name = key.partition(".")
        value = changed(getattr(config, section), {name: value}) if name else value
        config = replace(config, **{section: value})
    return config


def test_the_base_is_valid_on_more_ranks_too(base: Config) -> None:
    for world_size in (4, 8, 16):
        assert validate(base, world_size=world_size) == []
    check(base, 4)


@pytest.mark.parametrize(
    ("settings", "key", "got", "allowed"), BAD, ids=[" ".join(case[0]) for case in BAD]
)
def test_every_rule(
    base: Config, settings: dict[str, Any], key: str, got: str, allowed: str
) -> None:
    problems = validate(changed(base, settings), world_size=4)
    matching = [problem for problem in problems if problem.key == key and got in problem.got]
    assert sum(allowed in problem.allowed for problem in matching) == 1
    with pytest.raises(ConfigError) as caught:
        check(changed(base, settings), 4)
    assert caught.value.exit_code == 2
    assert len(caught.value.problems) == len(problems)
    message = str(caught.value)
    assert f"{key}:" in message
    assert got in message
    assert allowed in message


def test_instances_of_the_optimizer_are_equal_parts(base: Config) -> None:
    for instances in (1, 2, 4):
        assert validate(changed(base, {INSTANCES: instances}), world_size=16) == []
    (problem,) = validate(changed(base, {INSTANCES: 3}), world_size=16)
    assert problem.allowed == "a divisor of the 4 ranks with the same parameters"


def test_many_blocks_cross_no_cut_between_hybrid_blocks(base: Config) -> None:
    many = {"model.block_size": 1, "train.seq_length": 32896, "train.precision": Precision.bf16}
    assert validate(changed(base, {**many, "model.layout": "F S S | F S"}), world_size=4) == []
    assert validate(changed(base, {**many, "train.precision": Precision.fp32}), world_size=4) == []


def test_fp8_looks_at_the_layers_that_there_are(base: Config) -> None:
    """Gates of sparse layers, of which a baseline has none, make odd widths of few heads."""
    settings = {**FP8, "model.layout": "3*F 2*W", "model.sink": SinkKind.none}
    assert validate(changed(base, settings), world_size=4) == []
    (problem,) = validate(changed(base, FP8), world_size=4)
    assert problem.got == "132 columns a rank"


def test_a_group_may_be_shared_by_ranks(base: Config) -> None:
    one_group = changed(base, {"model.num_query_groups": 1})
    assert validate(one_group, world_size=4) == []


def test_muon_is_valid_where_its_matrices_are_whole(base: Config) -> None:
    muon = changed(base, {"optim.name": OptimizerName.muon})
    assert validate(muon, world_size=4) == []
    assert validate(changed(muon, {"model.num_query_groups": 1}), world_size=4) == []
    with_experts = changed(muon, {"model.moe": experts(8)})
    assert validate(with_experts, world_size=8) == []
    assert validate(changed(with_experts, {"parallel.ep": 2}), world_size=4) == []


@pytest.mark.parametrize("installed", [None, "0.1.0", "0.31.0"])
def test_muon_without_its_package(
    base: Config, monkeypatch: pytest.MonkeyPatch, installed: str | None
) -> None:
    def version(package: str) -> str:
        assert package == "emerging-optimizers"
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert validate(base, world_size=4) == []
    with pytest.raises(ConfigError) as caught:
        check(changed(base, {"optim.name": OptimizerName.muon}), 4)
    (problem,) = caught.value.problems
    assert problem.key == "optim.name"
    assert (installed or "not installed") in problem.got
    assert "pip install 'emerging-optimizers~=0.3.0'" in problem.allowed
    assert caught.value.exit_code == 2


def integers(section: Any, prefix: str = "") -> Iterator[str]:
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield from integers(value, f"{prefix}{item.name}.")
        elif item.type in (int, int | None):
            yield f"{prefix}{item.name}"


@pytest.mark.parametrize("number", [0, -1, 10**20])
def test_any_integer_may_be_no_size(base: Config, number: int) -> None:
    """Alone or all at once, rules find a problem and no error of their own."""
    keys = list(integers(base))
    assert {"parallel.ep", "model.window", "train.guard.spike_window"} <= set(keys)
    every = base
    for key in keys:
        wrong = changed(base, {key: number})
        found = validate(wrong, world_size=4)
        if number > 0:
            assert key in {problem.key for problem in found}
        every = changed(every, {key: number})
    found = {problem.key for problem in validate(every, world_size=4)}
    assert {"parallel.tp", "parallel.pp", "parallel.ep", "parallel.cp"} <= found


def test_all_problems_at_once_and_quickly(base: Config) -> None:
    settings = {key: value for case in BAD[:40] for key, value in case[0].items()}
    settings |= {"parallel.tp": 3, "parallel.pp": 2, "model.layout": "S F"}
    bad = changed(base, settings)
    start = time.process_time()
    problems = validate(bad, world_size=4)
    assert time.process_time() - start < 0.5
    assert len(problems) >= 20
    with pytest.raises(ConfigError) as caught:
        check(bad, 4)
    lines = str(caught.value).splitlines()
    columns = {line.index(" got ") for line in lines if " got " in line}
    assert len(columns) == 1
    for problem in problems:
        assert sum(line.startswith(f"  {problem.key}:") for line in lines) >= 1


def test_the_caret_of_a_layout_stays_under_its_character(base: Config) -> None:
    with pytest.raises(ConfigError) as caught:
        check(changed(base, {"model.layout": "F 3*S x"}), 4)
    lines = str(caught.value).splitlines()
    shown = next(index for index, line in enumerate(lines) if line.strip() == "F 3*S x")
    assert lines[shown].index("x") == lines[shown + 1].index("^")


@pytest.mark.parametrize("name", ["file", "file/below", "file/far/below"])
def test_a_run_directory_under_a_file(base: Config, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (problem,) = validate(changed(base, {"run_dir": str(tmp_path / name)}), world_size=4)
    assert problem.key == "run_dir"
    assert "file is not a directory" in problem.got


def test_a_run_directory_that_cannot_be_written(base: Config) -> None:
    (problem,) = validate(changed(base, {"run_dir": "/proc/self/run"}), world_size=4)
    assert problem.key == "run_dir"


def test_a_block_size_counts_where_blocks_are_selected(base: Config) -> None:
    settings = {
        "model.backend": Backend.triton,
        "train.precision": Precision.bf16,
        "model.block_size": 48,
    }
    for layout, keys in (("4*F", []), ("2*(F W)", []), ("F 3*S", ["model.block_size"])):
        problems = validate(changed(base, {**settings, "model.layout": layout}), world_size=4)
        assert [problem.key for problem in problems] == keys


@pytest.mark.parametrize("key", ["data.path", "data.evaluation.code"])
def test_a_run_directory_inside_the_text_that_it_reads(
    base: Config, tmp_path: Path, key: str
) -> None:
    text, link = tmp_path / "text", tmp_path / "link"
    text.mkdir()
    link.symlink_to(text)
    place = {"data.path": str(text)} if key == "data.path" else {"data.evaluation": {"code": text}}
    for beside in (tmp_path, tmp_path / "text-runs" / "a"):
        config = changed(base, {**place, "run_dir": str(beside)})
        assert validate(config, world_size=4) == []
    for inside in (text, text / "runs" / "a", link / "a"):
        (problem,) = validate(changed(base, {**place, "run_dir": str(inside)}), world_size=4)
        assert (problem.key, problem.got) == ("run_dir", str(inside))
        assert f"outside of {key}={text}" in problem.allowed


def test_checking_a_run_directory_leaves_no_trace(base: Config, tmp_path: Path) -> None:
    assert validate(changed(base, {"run_dir": str(tmp_path / "a" / "b")}), world_size=4) == []
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_without_a_card_is_none(base: Config, tmp_path: Path) -> None:
    """Megatron names its pairs of files by their stem."""
    (tmp_path / "corpus.idx").write_bytes(b"")
    stem = str(tmp_path / "corpus")
    (problem,) = validate(changed(base, {"data.path": stem}), world_size=4)
    assert (problem.key, problem.got) == ("data.path", stem)
    assert "a folder that hysparse prepare-data made" in problem.allowed


def test_online_tracking_without_a_key_is_a_warning(
    base: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    online = changed(base, {"tracking.mode": TrackingMode.online})
    assert validate(online, world_size=4) == []
    assert len(warnings(online)) == 1
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert warnings(online) == warnings(base) == []
