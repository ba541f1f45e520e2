"""Help, printing the configuration, make, and finding Python."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from run_commands import LOCAL, ROOT, Command, run

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.frozen import from_yaml
from tests.captured import captured

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("entry", ["hysparse_megatron", "launch.local"])
def test_cfg_prints_the_configuration(entry: str) -> None:
    overrides = ["experiment=quickstart", "train.steps=321"]
    output = run([*overrides, "--cfg", "job", "--resolve"], entry=("-m", entry), afresh=True)
    assert from_yaml(output) == compose(overrides)


@pytest.mark.parametrize("entry", ["hysparse_megatron", "launch.local"])
def test_help(entry: str) -> None:
    output = run(["--help"], entry=("-m", entry), afresh=True)
    for word in ("usage:", "quickstart", "exit codes"):
        assert word in output


def test_the_launcher_explains_its_own_option() -> None:
    output = run(["--help"], entry=LOCAL)
    assert "--nproc RANKS" in output
    assert "usage: hysparse launch" in output


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_ctrl_c_in_the_first_seconds_of_a_run(seconds: float, tmp_path: Path) -> None:
    """Sent to the launcher as soon as it has ranks, which import for seconds before they begin."""
    arguments = ["--nproc", "2", "parallel.tp=2", f"run_dir={tmp_path / 'run'}"]
    command = Command(arguments, entry=LOCAL, afresh=True)
    launcher = psutil.Process(command.process.pid)
    while command.process.poll() is None and len(launcher.children()) < 2:
        time.sleep(0.001)
    time.sleep(seconds)
    command.send(signal.SIGINT)
    assert command.finish() == 130, command.output
    assert command.output == "interrupted\n"


def test_make_help_lists_every_target() -> None:
    done = captured(["make", "--no-print-directory", "help"], cwd=ROOT)
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, flags=re.M)
    targets = re.findall(r"^([a-z-]+):", text, flags=re.M)
    assert set(targets) == set(phony.split())
    for target in targets:
        assert re.search(rf"^  make {target} +\w", done.stdout, flags=re.M), target
    assert captured(["make", "--no-print-directory"], cwd=ROOT).stdout == done.stdout


def find_python(path: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    words = ["/bin/sh", str(ROOT / "tools" / "find_python.sh"), *arguments]
    return captured(words, env={"PATH": str(path)}, code=code)


def write_python(path: Path, version: str, has_venv: bool = True) -> None:
    """A stand-in interpreter that answers as one of `version` would."""
    real = os.path.realpath(sys.executable)
    hide = "" if has_venv else "sys.modules['venv'] = None; "
    answer = f"import sys; {hide}sys.version_info = ({version.replace('.', ', ')}, 0)"
    path.write_text(f"#!/bin/sh\nexec {real} -c \"{answer}; exec('$2')\"\n")
    path.chmod(0o755)


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """A PATH with nothing but what the script itself needs."""
    cat = shutil.which("cat")
    assert cat is not None
    (tmp_path / "cat").symlink_to(cat)
    return tmp_path


def test_no_python_says_what_to_install(bin_folder: Path) -> None:
    done = find_python(bin_folder, code=1)
    assert done.stdout == ""
    for expected in ("Python 3.12", "pyenv install 3.12", "uv python install 3.12", "apt-get"):
        assert expected in done.stderr


def test_an_empty_path_still_says_so(tmp_path: Path) -> None:
    assert "needs Python 3.12" in find_python(tmp_path, code=1).stderr


def test_wrong_pythons_are_passed_over(bin_folder: Path) -> None:
    write_python(bin_folder / "python3", "3.11")
    write_python(bin_folder / "python3.12", "3.12", has_venv=False)
    find_python(bin_folder, code=1)
    write_python(bin_folder / "python", "3.12")
    assert find_python(bin_folder).stdout.strip() == str(bin_folder / "python")


def test_a_preferred_python_comes_first(bin_folder: Path) -> None:
    write_python(bin_folder / "python3.12", "3.12")
    (bin_folder / "mine").mkdir()
    mine = bin_folder / "mine" / "python"
    write_python(mine, "3.12")
    assert find_python(bin_folder, str(mine)).stdout.strip() == str(mine)
    assert find_python(bin_folder, "").stdout.strip() == str(bin_folder / "python3.12")
