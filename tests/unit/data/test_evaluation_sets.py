"""The sets of `data.evaluation`: prepared folders and text, in the tokenizer of the run."""

from dataclasses import replace
from pathlib import Path

import pytest
from prepared_corpora import documents, request, save_tokenizer
from prepared_corpora import prepare as prepare_folder
from tiny_corpora import prepare, write_json_lines

from hysparse_megatron.config.schema import DataConfig
from hysparse_megatron.data.card import PreparedCorpus
from hysparse_megatron.data.prepare import run
from hysparse_megatron.data.sources import (
    load_blend,
    load_data,
    load_evaluations,
    open_samples,
    prepared_folders,
    trained_on_too,
)
from hysparse_megatron.data.tokenizer_choice import choose_tokenizer
from hysparse_megatron.errors import DataError


@pytest.fixture
def settings(tmp_path: Path) -> DataConfig:
    return DataConfig(cache_dir=str(tmp_path / "cache"), validation_fraction=0.25)


def test_text_and_prepared_folders(
    shared_corpus: PreparedCorpus, settings: DataConfig, tmp_path: Path
) -> None:
    text = write_json_lines(tmp_path / "other.jsonl", 30, seed=2)
    sets = {"other": str(text), "own": shared_corpus.directory}
    found = load_evaluations(replace(settings, evaluation=sets), shared_corpus)
    assert list(found) == ["other", "own"]
    assert found["own"] == shared_corpus
    other = found["other"]
    assert isinstance(other, PreparedCorpus)
    assert other.tokenizer_sha256 == shared_corpus.tokenizer_sha256
    assert (other.train_documents, other.validation_documents) == (0, 30)
    # What `--data` of tools.evaluate and a later start find.
    again = load_evaluations(replace(settings, evaluation=sets), shared_corpus)
    assert again == found
    assert load_evaluations(settings, shared_corpus) == {}


@pytest.mark.parametrize("text_is_one_document", [False, True])
def test_all_of_text_is_evaluated(
    shared_corpus: PreparedCorpus, settings: DataConfig, tmp_path: Path, text_is_one_document: bool
) -> None:
    """But of the run's own what it holds out, however it is named."""
    text = write_json_lines(tmp_path / "other.jsonl", 30, seed=2)
    if text_is_one_document:
        text = text.rename(tmp_path / "other.txt")
    [other] = load_evaluations(
        replace(settings, evaluation={"other": str(text)}), shared_corpus
    ).values()
    assert isinstance(other, PreparedCorpus)
    assert other.train_tokens == 0
    assert other.validation_documents == (1 if text_is_one_document else 30)
    own = replace(settings, path=f"{tmp_path}/./{text.name}", evaluation={"own": str(text)})
    trained_on = load_data(replace(own, tokenizer=shared_corpus.tokenizer_path))
    [held_out] = load_evaluations(own, shared_corpus).values()
    assert held_out == trained_on
    assert 0 < trained_on.validation_tokens < other.validation_tokens
    with pytest.raises(DataError, match="all of it is held out, as a set to evaluate on"):
        open_samples(other, "train", 16)


def test_text_that_a_prepared_folder_was_made_of_is_named(
    shared_corpus: PreparedCorpus, settings: DataConfig, tmp_path: Path
) -> None:
    """Under whatever name: all of it would be evaluated, and most of it was trained on."""
    text = write_json_lines(tmp_path / "a.jsonl", 30, seed=2)
    trained = load_data(replace(settings, path=str(text), tokenizer=shared_corpus.tokenizer_path))
    copy = text.rename(tmp_path / "b.jsonl")
    other = write_json_lines(tmp_path / "c.jsonl", 30, seed=3)
    assert isinstance(trained, PreparedCorpus)
    evaluation = {"copy": str(copy), "other": str(other), "held_out": trained.directory}
    told: list[str] = []
    run = replace(settings, path=trained.directory, evaluation=evaluation)
    found = load_evaluations(run, trained, told.append)
    [warning] = [line for line in told if "WARNING" in line]
    assert warning.startswith(
        f"WARNING: data.evaluation.copy: {trained.directory} was made of b.jsonl as well"
    )
    assert found["held_out"] == trained
    assert prepared_folders(run) == [trained.directory]
    blend = replace(run, path=None, blend=f"1 {trained.directory}; 2 {shared_corpus.directory}")
    assert prepared_folders(blend) == [trained.directory, shared_corpus.directory]
    assert trained_on_too(found["copy"], prepared_folders(blend)) is not None
    assert trained_on_too(found["other"], prepared_folders(blend)) is None


def test_all_documents_end_alike(settings: DataConfig, tmp_path: Path) -> None:
    """Also where `--end-of-document` named another token than the one that would be found."""
    given = save_tokenizer(tmp_path / "tokenizer.json")
    source = write_json_lines(tmp_path / "train.jsonl", 30)
    plain = prepare_folder(tmp_path / "plain", source, tokenizer=given)
    named = choose_tokenizer(str(given), "a")
    corpus = run.prepare(replace(request(tmp_path / "named", source), tokenizer=named))
    assert corpus is not None
    assert corpus.end_of_document != plain.end_of_document

    text = write_json_lines(tmp_path / "other.jsonl", 30, seed=2)
    settings = replace(settings, evaluation={"other": str(text)})
    other = load_evaluations(settings, corpus)["other"]
    assert other.end_of_document == corpus.end_of_document
    assert isinstance(other, PreparedCorpus)
    ends = [tokens[-1] for tokens in documents(other.validation_prefix)]
    assert set(ends) == {corpus.end_of_document}

    ended = rf"documents end with token {plain.end_of_document}, those of .* with "
    settings = replace(settings, evaluation={"plain": plain.directory})
    with pytest.raises(DataError, match=rf"data\.evaluation\.plain: .*{ended}"):
        load_evaluations(settings, corpus)
    with pytest.raises(DataError, match=rf"{plain.directory}: its {ended}"):
        load_blend(f"1 {corpus.directory}; 1 {plain.directory}")


def test_mistakes_name_the_set(
    shared_corpus: PreparedCorpus, settings: DataConfig, tmp_path: Path
) -> None:
    source = write_json_lines(tmp_path / "other.jsonl", 30, seed=2)
    other = prepare(source, tmp_path / "cache", vocab_size=290)
    settings = replace(settings, evaluation={"other": other.directory})
    with pytest.raises(DataError, match=r"data\.evaluation\.other: .* another tokenizer"):
        load_evaluations(settings, shared_corpus)
    settings = replace(settings, evaluation={"none": str(tmp_path / "none")})
    with pytest.raises(DataError, match=r"data\.evaluation\.none: .*cannot be read"):
        load_evaluations(settings, shared_corpus)
