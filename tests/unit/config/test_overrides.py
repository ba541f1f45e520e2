"""Words of the command line lead from one split to any other, whatever settings there are."""

from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.overrides import changes
from hysparse_megatron.config.parallel import ParallelConfig, resized
from hysparse_megatron.config.schema import Config


def changed(section: Any) -> Any:
    """Every setting with another value than its default."""

    def other(value: Any) -> Any:
        if is_dataclass(value):
            return changed(value)
        return not value if isinstance(value, bool) else (value or 2) + 1

    found = {item.name: other(getattr(section, item.name)) for item in fields(section)}
    return type(section)(**found)


@pytest.fixture
def split() -> tuple[list[str], Config]:
    """A run whose settings of `parallel` are all others than the defaults, and its words."""
    asked = changes("parallel", ParallelConfig(), changed(ParallelConfig()))
    words = [f"{key}={value}" for key, value in asked.items()]
    return words, compose(words)


def test_all_settings_are_written(split: tuple[list[str], Config]) -> None:
    words, config = split
    assert config.parallel == changed(ParallelConfig())
    back = changes("parallel", config.parallel, ParallelConfig())
    assert compose([*words, *(f"{k}={v}" for k, v in back.items())]).parallel == ParallelConfig()
    assert changes("parallel", config.parallel, config.parallel) == {}
    assert changes("parallel", config.parallel, config.parallel, ["vpp"]) == {"parallel.vpp": "3"}


def test_another_split_keeps_what_fits_any(split: tuple[list[str], Config]) -> None:
    parallel, default = split[1].parallel, ParallelConfig()
    found = resized(parallel, tp=4, sequence_parallel=True)
    kept = {"timeout_seconds", "setup_timeout_seconds", "grad_reduce_in_fp32", "overlap"}
    for item in fields(ParallelConfig):
        wanted = getattr(parallel if item.name in kept else default, item.name)
        wanted = {"tp": 4, "sequence_parallel": True}.get(item.name, wanted)
        assert getattr(found, item.name) == wanted, item.name
