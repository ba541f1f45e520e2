"""What docs/checkpoints.md names exists, and the commands it shows are understood."""

import re
import shlex
from pathlib import Path

import pytest

from hysparse_megatron.config.schema import CheckpointConfig
from tools.checkpoint import _parser

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    hysparse checkpoint (.*)$", TEXT, flags=re.M)


def test_every_setting_exists() -> None:
    named = set(re.findall(r"`checkpoint\.(\w+)", TEXT))
    assert {"asynchronous", "keep", "keep_every", "step", "verify", "load"} <= named
    assert named <= CheckpointConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str) -> None:
    assert _parser().parse_args(shlex.split(command)).action
