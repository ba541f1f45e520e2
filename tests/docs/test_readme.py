"""What the README names exists, and the commands it shows are valid."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from hysparse_megatron.config.cli import load, parse_arguments
from hysparse_megatron.config.validate import validate
from tests.captured import captured

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


def text() -> str:
    return README.read_text(encoding="utf-8")


def shown_commands() -> list[str]:
    """Lines of the indented blocks and fences, comments cut off, continued lines joined."""
    joined = text().replace("\\\n", " ")
    indented = re.findall(r"^    +(\S.*)$", joined, flags=re.M)
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", joined, flags=re.M | re.S)).splitlines()
    lines = [re.sub(r"\s+#.*$", "", line).strip() for line in [*indented, *fenced]]
    return [line for line in lines if line]


def test_the_two_commands_are_there() -> None:
    for command in ("make train", "make test"):
        assert any(line.split()[:2] == command.split() for line in shown_commands()), command


def test_relative_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", text())
    relative = [target for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert relative, "a README without a link or figure"
    for target in relative:
        assert (ROOT / target.partition("#")[0]).exists(), target


def test_paths_in_backticks_exist() -> None:
    """Of the repository: run directories and the like are named by example."""
    quoted = re.findall(r"`([^`\n]+)`", text())
    paths = [name for name in quoted if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", name) and "/" in name]
    of_runs = ("runs/", "checkpoints/")
    named = [path for path in paths if not path.startswith(of_runs)]
    assert len(named) > 5
    for path in named:
        assert (ROOT / path).exists(), path


def test_make_targets_in_the_text_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z-]+)\b", " ".join(re.findall(r"`([^`]+)`", text()))))
    targets |= {line.split()[1] for line in shown_commands() if line.startswith("make ")}
    assert {"train", "test", "help"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


TRAINING = [
    line
    for line in (shown_commands() if README.exists() else [])
    if line.startswith(("make train", "torchrun", ".venv/bin/hysparse train"))
    and "--help" not in line
]


def test_there_are_training_commands() -> None:
    assert len(TRAINING) >= 5


@pytest.mark.parametrize("line", TRAINING)
def test_shown_training_commands_are_valid(line: str) -> None:
    """Composes and checks each; a path that the reader is to fill in may be missing."""
    words = shlex.split(line)
    if words[0] == "make":
        done = captured(["make", "--no-print-directory", "--dry-run", *words[1:]], cwd=ROOT)
        (command,) = [x for x in done.stdout.splitlines() if "hysparse launch" in x]
        words = shlex.split(command)
        ranks = int(words[words.index("--nproc") + 1])
        arguments = words[words.index("--nproc") + 2 :]
    else:
        named = next(word for word in words if word in ("hysparse_megatron", "train"))
        arguments = words[words.index(named) + 1 :]
        options = dict(itertools.pairwise(words))
        ranks = int(options.get("--nnodes", 1)) * int(options.get("--nproc-per-node", 1))
    parsed = parse_arguments(arguments)
    problems = [] if parsed.show else validate(load(parsed), world_size=ranks)
    filled_in = {"data.path", "run_dir"}
    assert [problem for problem in problems if problem.key not in filled_in] == []
