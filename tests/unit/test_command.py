"""What all commands share: their parser, their errors, and Ctrl-C."""

import pkgutil
import sys
from pathlib import Path

import pytest

import launch
import tools
from hysparse_megatron.command import INTERRUPTED, command, make_parser
from hysparse_megatron.errors import ConfigError, DataError, RankFailure
from tests.captured import Call, captured
from tools import checkpoint, plan

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]

COMMANDS = [
    f"{package.__name__}.{module.name}"
    for package in (launch, tools)
    for module in pkgutil.iter_modules(package.__path__)
    if not module.ispkg
    and '__name__ == "__main__"' in (Path(package.__path__[0]) / f"{module.name}.py").read_text()
]


def raising(error: BaseException):
    @command
    def main(argv):
        raise error

    return main


def test_errors_end_with_their_code_in_one_line(capsys: Capture) -> None:
    assert raising(DataError("no data"))([]) == 5
    assert capsys.readouterr().err == "DataError: no data\n"


def test_one_rank_tells(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "2")
    assert raising(ConfigError("bad"))([]) == 2
    assert capsys.readouterr().err == ""
    assert raising(RankFailure("rank 0 is gone", 0))([]) == 1
    assert "rank 0 is gone" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "two")  # nobody knows who is first: each tells
    assert raising(ConfigError("bad"))([]) == 2
    assert capsys.readouterr().err == "ConfigError: bad\n"


@pytest.mark.parametrize(
    ("main", "arguments", "told"),
    [
        (plan.main, ["--gpu=2"], "--gpu=2 (did you mean --gpus?)"),
        (plan.main, ["--quickstrt"], "--quickstrt (did you mean experiment=quickstart?)"),
        (checkpoint.main, ["verfy", "runs"], "verify, show, diff, prune) (did you mean verify?)"),
        (checkpoint.main, ["prune", "runs", "--kep-every", "2"], "(did you mean --keep-every?)"),
    ],
)
def test_the_nearest_option_is_named(main, arguments, told, call: Call) -> None:
    output = call(main, arguments, code=2).err
    assert told in output.replace("'", "")
    assert output.count("\n") == 1


def test_a_help_names_the_command(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as left:
        make_parser("hysparse plan", "What it does.").parse_args(["--help"])
    assert left.value.code == 0
    assert "usage: hysparse plan" in capsys.readouterr().out


READ_FIRST = ("tools.choose_full_layers", "tools.draw_layout", "tools.evaluate")
"""Commands that read their line before they import a library."""

INTERRUPTED_IMPORT = """
import importlib.abc, os, runpy, signal, sys

OURS = ("hysparse_megatron", "hysparse_kernels", "launch", "tools")

class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] not in (*OURS, *sys.stdlib_module_names):
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
"""Ctrl-C in the moment in which a command imports the first library."""


@pytest.mark.parametrize("name", ["hysparse_megatron", *COMMANDS])
def test_interrupted_in_the_first_seconds(name: str) -> None:
    program = [sys.executable, "-c", INTERRUPTED_IMPORT, name, "--wrong"]
    done = captured(program, cwd=ROOT, code=2 if name in READ_FIRST else INTERRUPTED)
    assert name in READ_FIRST or done.stderr == "interrupted\n"
