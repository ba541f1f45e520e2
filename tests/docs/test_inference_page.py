"""docs/inference.md: its commands are understood, its figures are those of the caches."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from hysparse_megatron.architecture.kv_cache import all_full
from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.config.compose import compose
from hysparse_megatron.inference.kv_cache import KvCache
from tools import benchmark_decode
from tools.generate import _parser

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8")
COMMANDS = re.findall(
    r"^    .*(?:hysparse|\.main) generate (.*)$", TEXT.replace("\\\n", " "), flags=re.M
)
NUMBER = r"([\d,]+)"
ROWS = re.findall(
    rf"^\| `(\w+)` \| `([^`]+)` \| {NUMBER} bytes \| {NUMBER} \| {NUMBER} \| {NUMBER}, ([\d.]+) t",
    TEXT,
    flags=re.M,
)


def test_commands_are_understood() -> None:
    assert len(COMMANDS) == 3
    for command in COMMANDS:
        assert _parser().parse_args(shlex.split(command)).run_dir


def test_options_are_those_there_are() -> None:
    options = {option for action in _parser()._actions for option in action.option_strings}
    (measured,) = re.findall(
        r"^    hysparse benchmark decode (.*)$", TEXT.replace("\\\n", " "), flags=re.M
    )
    args = benchmark_decode._parser().parse_args(shlex.split(measured))
    assert args.lengths == (8192, 32768, 131072)
    others = {"--nproc-per-node", *re.findall(r"--[a-z]+", measured)}
    named = set(re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", TEXT)) - others
    assert named == options - {"-h", "--help"}


def test_named_files_exist() -> None:
    named = re.findall(r"`([\w/]+(?:\.py|/\w+))`", TEXT)
    assert len(named) > 6
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_figures_are_those_of_the_caches(row: tuple[str, ...]) -> None:
    name, layout, *figures, factor = row
    model = compose([f"model={name}"]).model
    assert model.layout == layout
    kinds = parse_layout(layout).kinds
    found, full = (
        KvCache(
            model,
            of_layers,
            [32_768],
            full_dtype=torch.bfloat16,
            window_dtype=torch.bfloat16,
            device="meta",
        ).bytes_by_kind()
        for of_layers in (kinds, all_full(kinds))
    )
    sizes = [sum(found.values()), found[LayerKind.FULL], found[LayerKind.SPARSE]]
    sizes.append(sum(full.values()))
    assert [f"{size:,}" for size in sizes] == figures
    assert f"{sizes[-1] / sizes[0]:.2f}" == factor


def test_both_models_are_there() -> None:
    assert [row[0] for row in ROWS] == ["hysparse_80b_a3b", "hysparse_7b"]
