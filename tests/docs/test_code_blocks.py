"""Every block of code in the README and on every page is run, or parsed by what would run it."""

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Callable

import pytest
import torch
import yaml

from hysparse_megatron.command import CommandParser
from hysparse_megatron.config.cli import arguments_of, load
from hysparse_megatron.config.validate import validate
from hysparse_megatron.main import COMMANDS
from hysparse_megatron.plan.ranks import num_ranks
from tests.captured import captured
from tests.docs.blocks import BLOCKS, ROOT, Block

SHELL = [block for block in BLOCKS if not block.language]
PYTHON = [block for block in BLOCKS if block.language == "python"]
LINES = [(block.page, line) for block in SHELL for line in block.commands]
OTHERS = {
    *("apptainer", "cd", "compute-sanitizer", "cp", "docker", "enroot", "lm_eval", "pip"),
    *("nsys", "torchfrtrace"),
}
"""Commands that are not this project's."""
FILLED_IN = ("data.path", "run_dir", "checkpoint.load", "data.blend")
"""Settings that name what the reader has."""
OF_THE_READER = "experiment=tuned"
"""A preset that a command before makes."""


class ParsedError(BaseException):
    """Ends a command when its line has been read."""


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], argparse.Namespace]:
    """Gives the words after `hysparse` to the command's own parser."""

    def stop(name: str) -> None:
        real = getattr(CommandParser, name)

        def parse(self: CommandParser, *args: object) -> argparse.Namespace:
            if self.prog.count(" ") > len(found["name"].split()):  # of an action of the command
                return real(self, *args)
            raise ParsedError(real(self, *args))

        monkeypatch.setattr(CommandParser, name, parse)

    found = {"name": ""}
    stop("parse_args")
    stop("parse_intermixed_args")

    def read(words: list[str]) -> argparse.Namespace:
        found["name"] = next(name for n in (2, 1) if (name := " ".join(words[:n])) in COMMANDS)
        main = importlib.import_module(f"hysparse_megatron.{COMMANDS[found['name']][0]}").main
        with pytest.raises(ParsedError) as parsed:
            raise AssertionError(f"ended with {main(words[len(found['name'].split()) :])}")
        return parsed.value.args[0]

    return read


def check_settings(found: argparse.Namespace, ranks: int | None) -> None:
    """Composes and validates what the command line sets, unless it is a sweep."""
    if getattr(found, "multirun", False):
        return
    found.overrides = [word for word in found.overrides if word != OF_THE_READER]
    config = load(arguments_of(found))
    problems = validate(config, world_size=ranks or num_ranks(config))
    assert [problem for problem in problems if not problem.key.startswith(FILLED_IN)] == []


def make(words: list[str]) -> list[str]:
    """What `make` runs that is a command of this project's, else nothing."""
    done = captured(["make", "--no-print-directory", "--dry-run", *words], cwd=ROOT)
    return re.findall(r"hysparse (launch .*)$", done.stdout, flags=re.M)


@pytest.mark.thorough
@pytest.mark.parametrize(("page", "line"), LINES, ids=lambda text: str(text).replace("/", "."))
def test_commands_are_understood(page: str, line: str, read) -> None:
    words = shlex.split(line)
    words = [word for n, word in enumerate(words) if n or not re.match(r"HYSPARSE_\w+=", word)]
    name = words[0].rpartition("/")[2]
    if re.match(r"HYSPARSE_\w+=", words[0]) or name in OTHERS:
        return
    if name == "make":
        for command in make(words[1:]):
            launched = read(shlex.split(command))
            check_settings(launched, launched.nproc)
        return
    if name in ("python", "torchrun"):
        rest = words[words.index("-m") + 1 :] if "-m" in words else words[3:]
        if rest[0].endswith(".py"):
            assert (ROOT / rest[0]).is_file()
            return
        if rest[0] not in ("hysparse_megatron", "hysparse_megatron.main"):
            assert is_module(rest[0]), rest[0]
            return
        words = ["hysparse", *(["train"] if rest[0] == "hysparse_megatron" else []), *rest[1:]]
    else:
        assert name == "hysparse", f"{page}: {line}: neither known, nor fenced as something else"
    if words[-1] == "--help":
        assert words[-2] in COMMANDS or words[-2].endswith("hysparse")
        return
    found = read(words[1:])
    if words[1] in ("train", "submit", "plan", "preflight"):
        check_settings(found, getattr(found, "gpus", None))


def is_module(name: str) -> bool:
    """Whether `python -m name` finds something: here, or where kernels/README.md changes to."""
    path = name.replace(".", "/")
    here = [ROOT / path, ROOT / f"{path}.py", ROOT / "kernels" / path]
    return any(one.exists() for one in here) or importlib.util.find_spec(name) is not None


def test_languages_are_known() -> None:
    assert {block.language for block in BLOCKS} <= {"", "python", "yaml", "text"}
    assert len(LINES) > 60
    assert len(PYTHON) > 5


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_programs_parse_and_import_what_there_is(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert [item.name for item in node.names if not hasattr(module, item.name)] == []


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=str)
def test_yaml_is_yaml(block: Block) -> None:
    assert isinstance(yaml.safe_load(block.text), dict)


def test_the_hybrid_block_of_the_kernels_runs() -> None:
    [block] = [block for block in PYTHON if block.page == "docs/extending.md"]
    found: dict = {}
    exec(block.text, found)
    assert found["sparse"].shape == found["oracle"].output.shape
    assert all(found[name].grad.any() for name in ("key", "value"))


def test_pages_of_the_kernels_run() -> None:
    """The blocks of kernels/README.md, with the tensors that they speak of."""
    blocks = [block for block in PYTHON if block.page == "kernels/README.md"]
    assert len(blocks) == 3
    found: dict = {
        "query": torch.randn(1, 128, 4, 16),
        "other_query": torch.randn(1, 128, 4, 16),
        "key": torch.randn(1, 128, 2, 16, requires_grad=True),
        "value": torch.randn(1, 128, 2, 16, requires_grad=True),
        "sink": torch.zeros(4),
        "chunks": [(0, 50), (50, 128)],
    }
    exec(blocks[0].text, found)
    exec(f"from hysparse_kernels import KeyValueGradients\n{blocks[1].text}", found)
    assert found["sparse"].shape == found["query"].shape
    assert found["oracle"].block_indices.shape == (1, 2, 78, 16)
