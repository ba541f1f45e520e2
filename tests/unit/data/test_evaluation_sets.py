"""The sets of `data.evaluation`: prepared folders and text, in the tokenizer of the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_corpora import prepare, write_json_lines

from hysparse_megatron.config.schema import DataConfig
from hysparse_megatron.data.card import PreparedCorpus
from hysparse_megatron.data.sources import load_evaluations
from hysparse_megatron.errors import DataError

SEED = 7


@pytest.fixture
def settings(tmp_path: Path) -> DataConfig:
    return DataConfig(cache_dir=str(tmp_path / "cache"), validation_fraction=0.25)


def test_text_and_prepared_folders(
    shared_corpus: PreparedCorpus, settings: DataConfig, tmp_path: Path
) -> None:
    text = write_json_lines(tmp_path / "other.jsonl", 30, seed=2)
    sets = {"other": str(text), "own": shared_corpus.directory}
    found = load_evaluations(replace(settings, evaluation=sets), SEED, shared_corpus)
    assert list(found) == ["other", "own"]
    assert found["own"] == shared_corpus
    other = found["other"]
    assert isinstance(other, PreparedCorpus)
    assert other.tokenizer_sha256 == shared_corpus.tokenizer_sha256
    assert other.train_documents + other.validation_documents == 30
    # What `--data` of tools.evaluate and a later start find.
    again = load_evaluations(replace(settings, evaluation=sets), SEED, shared_corpus)
    assert again == found
    assert load_evaluations(settings, SEED, shared_corpus) == {}


def test_mistakes_name_the_set(
    shared_corpus: PreparedCorpus, settings: DataConfig, tmp_path: Path
) -> None:
    source = write_json_lines(tmp_path / "other.jsonl", 30, seed=2)
    other = prepare(source, tmp_path / "cache", vocab_size=290)
    settings = replace(settings, evaluation={"other": other.directory})
    with pytest.raises(DataError, match=r"data\.evaluation\.other: .* another tokenizer"):
        load_evaluations(settings, SEED, shared_corpus)
    settings = replace(settings, evaluation={"none": str(tmp_path / "none")})
    with pytest.raises(DataError, match=r"data\.evaluation\.none: .*cannot be read"):
        load_evaluations(settings, SEED, shared_corpus)
