"""Fixtures of the data tests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tiny_corpora import prepare, write_json_lines

from hysparse_megatron.data import PreparedCorpus


@pytest.fixture(scope="session")
def shared_corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    """One prepared corpus for tests that only read it."""
    folder = tmp_path_factory.mktemp("shared")
    return prepare(write_json_lines(folder / "corpus.jsonl", 60), folder / "cache")


@pytest.fixture
def fresh_seed(record_property: Any) -> int:
    """A new random seed each run; shown by pytest when the test fails."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"fresh_seed = {seed}")
    record_property("fresh_seed", seed)
    return seed


@pytest.fixture(scope="session")
def shared_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small source file for tests that only read it."""
    return write_json_lines(tmp_path_factory.mktemp("source") / "corpus.jsonl", 40)
