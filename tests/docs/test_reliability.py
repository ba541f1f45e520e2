"""docs/reliability.md names what exists."""

import re
from pathlib import Path

from hysparse_megatron.config.describe import type_of
from hysparse_megatron.status import _FIELDS, STATES

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"`([^`\n]+)`", TEXT)


def test_named_tests_exist() -> None:
    there = "".join(path.read_text() for path in (ROOT / "tests" / "fault").glob("test_*.py"))
    named = [name for name in QUOTED if name.startswith("test_")]
    assert len(named) > 20
    for name in named:
        assert f"def {name}(" in there, name


def test_named_files_and_settings_exist() -> None:
    for name in QUOTED:
        if name.endswith(".py"):
            assert (ROOT / name).exists(), name
        if re.fullmatch(r"(train|parallel)\.[\w.]+", name):
            assert type_of(name) is not None, name


def test_all_fields_and_states_of_the_status_are_told() -> None:
    assert set(_FIELDS) <= set(QUOTED)
    for state in (*STATES.values(), "running", "finished", "failed"):
        assert state in TEXT
