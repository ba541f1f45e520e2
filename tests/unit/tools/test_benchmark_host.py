"""`hysparse benchmark host`: every part's commands are valid, before any GPU is there."""

import shlex

import pytest

from tests.captured import Call
from tools.benchmark_host import PARTS, main
from tools.step_benchmark.cases import make_cases
from tools.step_benchmark.options import parse


@pytest.mark.thorough
@pytest.mark.parametrize("part", PARTS)
def test_the_commands_of_a_part_are_valid(part: str, call: Call) -> None:
    lines = call(main, [part, "--gpus", "4", "--dry-run", "--output", "logs"]).out.splitlines()
    assert lines
    logs = []
    for line in lines:
        *words, log = shlex.split(line)
        assert words[:3] == ["hysparse", "benchmark", "step"]
        logs.append(log)
        ranks = {case.split.ranks for case in make_cases(parse([*words[3:], log]))}
        assert max(ranks) == 4
        assert part != "scaling" or ranks == {1, 2, 4}
    assert len(set(logs)) == len(logs)
    assert all(log.startswith(f"logs/{part}-4-") for log in logs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("7b --gpus 0 --dry-run", "got 0; allowed 2, 4, 8"),
        ("7b --gpus 3 --dry-run", "got 3; allowed 2, 4, 8"),
        ("7b --gpus 1024", "this host has"),
    ],
)
def test_numbers_that_cannot_be_are_refused(arguments: str, message: str, call: Call) -> None:
    assert message in call(main, arguments.split(), code=2).err
