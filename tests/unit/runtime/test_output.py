"""Output that nobody reads, or that cannot be written."""

import os
import subprocess
import sys

import pytest

from tests.captured import captured

PROGRAM = """
import sys
from hysparse_megatron.command import command
def main(argv):
    for number in range(5000):
        print("line", number)
    print("still here", file=sys.stderr, flush=True)
    return 7
sys.exit(command(main, is_run={is_run})())
"""


def run(is_run: bool, **streams: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM.format(is_run=is_run)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **streams)


@pytest.mark.parametrize("is_run", [True, False])
def test_nobody_reads(is_run: bool) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(is_run, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (7, "still here\n")


def test_a_full_disk_ends_no_run_but_a_command_whose_output_is_lost() -> None:
    with open("/dev/full", "w") as full:
        done = run(True, stdout=full.fileno())
        assert done.returncode == 7
        told = "note: standard output is not complete: No space left on device\n"
        assert done.stderr == f"still here\n{told}"
        done = run(False, stdout=full.fileno())
    assert done.returncode == 1
    assert done.stderr == "error: standard output is not complete: No space left on device\n"


def test_characters_that_a_terminal_does_not_know() -> None:
    program = PROGRAM.replace('"line", number', '"a \\u6771 b \\udce9"').replace("5000", "1")
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-c", program.format(is_run=True)]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (7, b"a \\u6771 b \\udce9\n")


@pytest.mark.parametrize("closed", [1, 2])
def test_no_file_takes_the_place_of_a_closed_output(closed: int, tmp_path) -> None:
    """Where standard output is closed, the next file opened would get what is printed."""
    program = PROGRAM.replace("def main(argv):", "def main(argv):\n    file = open(argv[0], 'w')")
    command = [sys.executable, "-c", program.format(is_run=True), str(tmp_path / "file")]
    shell = ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *command]
    captured(shell, code=7)
    assert (tmp_path / "file").read_text() == ""
