"""What a long evaluation says meanwhile."""

import pytest

from hysparse_megatron.evaluation.progress import Progress

Capture = pytest.CaptureFixture[str]


def test_lines_with_the_time_left(capsys: Capture) -> None:
    now = [100.0]
    progress = Progress("10 questions", 10 * 64, clock=lambda: now[0])
    assert capsys.readouterr().err == "10 questions\n", "at once, before the first is answered"
    answered = progress.by(64)
    for seconds, told in ((9.0, ""), (2.0, "20% done, ETA 0:44"), (6.0, ""), (6.0, "40%")):
        now[0] += seconds
        answered(1)
        line = capsys.readouterr().err
        assert told in line
        assert bool(line) == bool(told)
    now[0] += 60.0
    answered(6)
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", ""), "the result says that it is done"


def test_only_one_rank_speaks(capsys: Capture) -> None:
    now = [0.0]
    progress = Progress("x", 3, is_quiet=True, clock=lambda: now[0])
    for item in progress.counting("abc"):
        now[0] += 100.0
        assert item in "abc"
    assert capsys.readouterr().err == ""
