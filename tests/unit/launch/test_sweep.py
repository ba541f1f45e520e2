"""Points of a sweep: combinations, names, run directories, mistakes."""

import itertools
import random
import re
from pathlib import Path

import pytest

from hysparse_megatron.errors import ConfigError
from launch.sweep import points


def test_without_lists_there_is_one_point() -> None:
    (point,) = points(["train.seed=3", "name=one"])
    assert point.chosen == ()
    assert (point.config.name, point.config.run_dir) == ("one", "runs/one")


def test_all_combinations_last_fastest(rng: random.Random) -> None:
    seeds = rng.sample(range(1000), 2)
    found = points([f"train.seed={seeds[0]},{seeds[1]}", "optim.warmup_steps=range(1,4)", "name=s"])
    chosen = [(point.config.train.seed, point.config.optim.warmup_steps) for point in found]
    assert chosen == list(itertools.product(seeds, (1, 2, 3)))
    assert found[0].config.name == f"s-seed_{seeds[0]}-warmup_steps_1"
    assert found[0].config.run_dir == f"runs/{found[0].config.name}"
    assert len({point.config.run_dir for point in found}) == 6
    assert {point.config.tracking.group for point in found} == {"s"}


def test_run_directories_lie_below_a_given_one() -> None:
    found = points(["run_dir=/data/sweep", "optim.learning_rate=1e-3,2e-3"])
    assert [point.config.run_dir for point in found] == [
        "/data/sweep/learning_rate_0.001",
        "/data/sweep/learning_rate_0.002",
    ]


def test_so_they_do_below_that_of_a_preset(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    preset = "# @package _global_\nrun_dir: /scratch/mine\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(preset)
    found = points([f"--config-dir={tmp_path}", "experiment=mine", "train.seed=1,2"])
    assert [p.config.run_dir for p in found] == ["/scratch/mine/seed_1", "/scratch/mine/seed_2"]


LONG = "the same long beginning of a text that many would like to try out, which is cut off " * 2


@pytest.mark.parametrize(
    "override",
    [
        "model.layout='F S | S','F S S'",
        "data.path=/data/a_b,/data/a/b,/data/a-b",
        f"tracking.sample_prompt='{LONG}1','{LONG}2'",
    ],
)
def test_values_that_no_name_tells_apart_have_places_of_their_own(override: str) -> None:
    found = points([override, "name=s", "train.seed=1,2"])
    again = points([override, "name=s", "train.seed=1,2"])
    names = [point.config.name for point in found]
    assert len(set(names)) == len(names) == len({point.config.run_dir for point in found}) >= 4
    assert names == [point.config.name for point in again]
    assert all(re.fullmatch(r"s-[\w.-]{1,120}", name) for name in names)


def test_groups_and_layouts_can_be_swept() -> None:
    found = points(["model=tiny_hysparse,tiny_full", "train.seed=1"])
    assert [point.config.model.layout for point in found] != [found[0].config.model.layout] * 2
    found = points(["model.layout='2*(F S)','4*F'"])
    assert [point.config.model.layout for point in found] == ["2*(F S)", "4*F"]
    (one,) = points(["model.layout=2*(F 3*S) F"])
    assert one.config.model.layout == "2*(F 3*S) F"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.seed=1,1"], "two points of the sweep are the same"),
        (["train.seed=range(1"], "not a sweep that Hydra can read"),
        (["train.seeds=1,2"], "did you mean seed?"),
    ],
)
def test_mistakes(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        points(overrides)
