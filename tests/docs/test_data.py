"""docs/data.md names the options there are, and its commands are valid."""

import re
import shlex
import sys
from pathlib import Path

from tests.captured import captured
from tools.prepare_data import _parser

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_every_option_is_explained_and_no_other() -> None:
    options = {option for action in _parser()._actions for option in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", TEXT))
    others = {
        "--megabytes",
        "--rampup-batch-size",
    }  # of measure-prepare and Megatron-LM
    assert named - others == options - {"-h", "--help"}


def test_shown_commands_are_valid() -> None:
    joined = re.sub(r" \\\n +", " ", TEXT)
    lines = re.findall(r"^    hysparse prepare-data (.*)$", joined, flags=re.M)
    assert len(lines) >= 2
    for line in lines:
        _parser().parse_args(shlex.split(line))


def test_the_recipe_of_filters_is_there_and_tells_its_options() -> None:
    path = Path(__file__).resolve().parents[2] / "examples" / "clean_corpus.py"
    assert "`examples/clean_corpus.py`" in TEXT
    done = captured([sys.executable, str(path), "--help"])
    for option in ("--warc", "--language", "--evaluations", "--tasks"):
        assert option in done.stdout
