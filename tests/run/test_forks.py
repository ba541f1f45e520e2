"""Commands that are forks end, and are found, as ones with an interpreter of their own."""

import signal

import pytest
from run_commands import Command, processes_naming, run

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("import sys; print(sys.argv[1:])", 0, "['some', 'words']\n"),
        ("import sys; sys.exit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("import atexit; atexit.register(print, 'last'); print('first')", 0, "first\nlast\n"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong\n"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
    ],
)
def test_an_ending(program: str, code: int, said: str) -> None:
    for afresh in (False, True):
        output = run(["some", "words"], entry=("-c", program), afresh=afresh, code=code)
        assert output.endswith(said)
        assert bool(output) == bool(said)


def test_it_is_found_by_its_words_while_it_runs() -> None:
    program = "import time; print('there', flush=True); time.sleep(600)"
    command = Command(["words-of-one-fork"], entry=("-c", program))
    command.wait_for("there")
    (line,) = processes_naming("words-of-one-fork")
    assert line.startswith(f"{command.process.pid}: ")
    command.send(signal.SIGTERM)
    assert command.finish() == -signal.SIGTERM
    assert processes_naming("words-of-one-fork") == []
