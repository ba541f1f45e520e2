"""Fixtures of the data tests."""

from pathlib import Path

import pytest
from tiny_corpora import prepare, write_json_lines

from hysparse_megatron.data.card import PreparedCorpus


@pytest.fixture(scope="session")
def shared_corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    """One prepared corpus for tests that only read it."""
    folder = tmp_path_factory.mktemp("shared")
    return prepare(write_json_lines(folder / "corpus.jsonl", 60), folder / "cache")


@pytest.fixture(scope="session")
def shared_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small source file for tests that only read it."""
    return write_json_lines(tmp_path_factory.mktemp("source") / "corpus.jsonl", 40)
