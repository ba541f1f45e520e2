"""The command `hysparse`: its subcommands, help, version, completion, and what it prints."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hysparse_megatron import __version__
from hysparse_megatron.command import hysparse
from hysparse_megatron.completion import candidates
from hysparse_megatron.completion import main as completion
from hysparse_megatron.main import COMMANDS, main
from tests.captured import Call, captured, import_path

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


def run(*words: str, cwd: Path, code: int) -> subprocess.CompletedProcess[str]:
    """As a process of its own, from a folder outside the checkout."""
    environment = {**os.environ, "PYTHONPATH": import_path(ROOT, ROOT / "kernels")}
    command = [sys.executable, "-m", "hysparse_megatron.main", *words]
    return captured(command, cwd=cwd, env=environment, code=code)


def test_the_help_lists_every_command(call: Call) -> None:
    listed = call(main, ["--help"]).out
    assert all(f"  {name} " in listed for name in COMMANDS)
    assert call(main, [], code=2).out == listed


def test_every_module_of_a_command_is_there_and_has_its_name() -> None:
    for name, (module, _) in COMMANDS.items():
        path = module.replace(".", "/") + ".py"
        text = next(
            found.read_text()
            for found in (ROOT / "hysparse_megatron" / path, ROOT / path)
            if found.is_file()
        )
        assert 'if __name__ == "__main__"' in text
        assert f"hysparse {name}" in text


NO_COMMANDS = {"requeue.py", "screenshots.py"}
"""Of job scripts, and for the pictures of this repository's pages."""


def test_every_tool_is_a_command() -> None:
    named = {f"{module.replace('.', '/')}.py" for module, _ in COMMANDS.values()}
    for path in (*ROOT.glob("tools/*.py"), *ROOT.glob("launch/*.py")):
        if "def main(argv" in path.read_text() and path.name not in NO_COMMANDS:
            assert str(path.relative_to(ROOT)) in named


def test_help_and_version_import_no_library() -> None:
    program = (
        "import sys; from hysparse_megatron.main import main; main(sys.argv[1:]); "
        "print({'torch', 'hydra', 'numpy'} & set(sys.modules))"
    )
    for option in ("--help", "--version"):
        done = captured([sys.executable, "-c", program, option], cwd=ROOT)
        assert done.stdout.endswith("set()\n"), done.stdout + done.stderr
    assert f"hysparse {__version__}\n" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plna"], "plna: no command (did you mean plan?)"),
        (["benchmark", "stpe"], "benchmark: no command (did you mean benchmark step?)"),
    ],
)
def test_an_unknown_command_names_the_nearest(words: list[str], message: str, call: Call) -> None:
    assert message in call(main, words, code=2).err


def test_a_command_ends_as_its_module_does(tmp_path: Path) -> None:
    done = run("plan", "model=tiny_hysparse", "train.seq_len=3", cwd=tmp_path, code=2)
    assert done.stdout == ""
    assert "train.seq_len" in done.stderr
    run("checkpoint", "list", ".", cwd=tmp_path, code=6)


@pytest.mark.parametrize(
    ("line", "some", "none"),
    [
        ([""], {"plan", "benchmark"}, {"step", "--help"}),
        (["benchmark", ""], {"step", "decode"}, {"plan"}),
        (["plan", "--"], {"--gpus", "--config-dir", "model="}, {"--nproc"}),
        (["launch", "--"], {"--nproc", "--cfg", "experiment="}, {"--gpus"}),
        (["plan", "model", "="], {"tiny_hysparse"}, {"quickstart"}),
        (["plan", "experiment", "=", "qui"], {"quickstart"}, {"tiny_hysparse"}),
        (["checkpoint", ""], {"prune", "verify"}, {"--keep"}),
        (["checkpoint", "prune", "--k"], {"--keep", "--dry-run"}, {"model="}),
    ],
)
def test_completion(line: list[str], some: set[str], none: set[str]) -> None:
    found = set(candidates(line))
    assert some <= found
    assert not none & found


def test_bash_completes_by_the_script(tmp_path: Path, capsys: Capture) -> None:
    assert completion(["bash"]) == 0
    script = capsys.readouterr().out
    program = tmp_path / "hysparse"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m hysparse_megatron.main "$@"\n')
    program.chmod(0o755)
    asked = f"COMP_WORDS=({program} checkpoint pr); COMP_CWORD=2; _hysparse {program}"
    done = captured(
        ["bash", "-c", f'{script}\n{asked}; echo "${{COMPREPLY[@]}}"'],
        env={**os.environ, "PYTHONPATH": import_path(ROOT, ROOT / "kernels")},
    )
    assert done.stdout == "prune\n", done.stderr


def test_printed_commands_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "some env" / "bin"
    folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.chdir(tmp_path)
    assert hysparse() == "'some env/bin/python' -m hysparse_megatron.main"
    (folder / "hysparse").write_text("#!/bin/sh\n")
    (folder / "hysparse").chmod(0o755)
    assert hysparse() == "'some env/bin/hysparse'"
    monkeypatch.setenv("PATH", str(folder))
    assert hysparse() == "hysparse"


def test_the_wheel_has_every_package() -> None:
    """The list of pyproject.toml against the folders with code; presets have none."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    roots = {
        "hysparse_kernels": ROOT / "kernels" / "hysparse_kernels",
        "hysparse_megatron": ROOT / "hysparse_megatron",
        "hysparse_megatron.launch": ROOT / "launch",
        "hysparse_megatron.tools": ROOT / "tools",
    }
    found = {
        ".".join([name, *folder.relative_to(root).parts])
        for name, root in roots.items()
        for folder in {path.parent for path in root.rglob("*.py")}
    }
    assert set(settings["packages"]) == found | {"hysparse_megatron.conf"}
