"""The tokenizer of a finished run is found by its hash."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from prepared_corpora import (
    make_texts,
    prepare,
    request,
    save_beginning_tokenizer,
    save_sentencepiece,
    save_tokenizer,
    write_lines,
)
from tokenizers import Tokenizer

from hysparse_megatron.config.schema import DataConfig
from hysparse_megatron.data.prepare import run
from hysparse_megatron.data.run_tokenizer import load_file, load_run_tokenizer
from hysparse_megatron.data.sources import changed_fields
from hysparse_megatron.data.tokenizer_choice import choose_tokenizer
from hysparse_megatron.errors import DataError

TEXT = make_texts(3)[2]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def settings(folder: Path, **changes: str) -> DataConfig:
    return DataConfig(**{"cache_dir": str(folder / "cache"), **changes})


def test_in_the_cache_among_others(tmp_path: Path) -> None:
    for size in (300, 320, 340):
        (tmp_path / "cache" / str(size)).mkdir(parents=True)
        save_tokenizer(tmp_path / "cache" / str(size) / "tokenizer.json", size)
    wanted = digest(tmp_path / "cache" / "320" / "tokenizer.json")
    found = load_run_tokenizer(settings(tmp_path, path="gone"), wanted)
    assert found.vocab_size == 320
    assert found.decode(found.encode(TEXT)) == TEXT


@pytest.mark.parametrize("key", ["tokenizer", "path", "blend"])
def test_where_the_settings_say(key: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer.json", 300)
    folder = f"1 {tmp_path}" if key == "blend" else str(tmp_path)
    found = load_run_tokenizer(
        settings(tmp_path, **{key: folder}), digest(tmp_path / "tokenizer.json")
    )
    assert found.vocab_size == 300


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers"])
def test_of_prepared_data(kind: str, tmp_path: Path) -> None:
    """Text and back, and the end that its documents were closed with."""
    made = tmp_path / "prepared"
    given = tmp_path / ("given.model" if kind == "sentencepiece" else "given.json")
    (save_sentencepiece if kind == "sentencepiece" else save_tokenizer)(given)
    corpus = write_lines(tmp_path / "a.jsonl", make_texts(30))
    prepared = prepare(made, corpus, tokenizer=given)
    found = load_run_tokenizer(settings(tmp_path, path=str(made)), digest(given))
    assert found.end_of_document == prepared.end_of_document
    assert found.vocab_size == prepared.vocab_size
    ids = found.encode(TEXT)
    assert len(ids) > 3
    assert found.decode(ids).split() == TEXT.split()


def test_the_card_knows_another_end(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer.json", 300)
    (tmp_path / "dataset.json").write_text('{"end_of_document": 77}')
    wanted = digest(tmp_path / "tokenizer.json")
    assert load_run_tokenizer(settings(tmp_path, path=str(tmp_path)), wanted).end_of_document == 77


def test_what_the_checkpoint_says_of_the_end_counts(tmp_path: Path) -> None:
    """Where settings name the tokenizer as it was given, beside data with another end."""
    given = save_tokenizer(tmp_path / "tokenizer.json", 300)
    source = write_lines(tmp_path / "a.jsonl", make_texts(30))
    asked = request(tmp_path / "made", source)
    made = run.prepare(replace(asked, tokenizer=choose_tokenizer(str(given), "a")))
    assert made is not None
    data = settings(tmp_path, path=made.directory, tokenizer=str(given))
    identity = made.identity()
    end = Tokenizer.from_file(str(given)).token_to_id("a")
    assert made.end_of_document == end != load_run_tokenizer(data, digest(given)).end_of_document
    found = load_run_tokenizer(data, digest(given), None, identity)
    assert found.end_of_document == end
    assert load_file(given, identity).end_of_document == end
    del identity["end_of_document"]  # as checkpoints of before
    assert load_file(given, identity).end_of_document == 0
    assert changed_fields(identity, made.identity()) == []


def test_what_the_checkpoint_says_of_the_begin_counts(tmp_path: Path) -> None:
    """None where it says nothing of it; weights from elsewhere have no data and go by the file."""
    given = save_beginning_tokenizer(tmp_path / "tokenizer.json")
    begin = Tokenizer.from_file(str(given)).token_to_id("<s>")
    source = write_lines(tmp_path / "a.jsonl", make_texts(30))
    identity = prepare(tmp_path / "made", source, tokenizer=given).identity()
    data = settings(tmp_path, path="gone", tokenizer=str(given))
    before = {name: value for name, value in identity.items() if name != "begin_of_document"}
    other = {**identity, "begin_of_document": 9}
    for said, expected in [(identity, begin), (other, 9), (before, None), ({}, begin)]:
        found = load_run_tokenizer(data, digest(given), None, said)
        assert found.begin_of_document == expected
        first = [] if expected is None else [expected]
        assert found.encode_prompt(TEXT) == first + found.encode(TEXT)
    assert changed_fields(identity, before) == [f"begin_of_document: {begin} -> unset"]


def test_another_one_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer.json", 300)
    with pytest.raises(DataError, match="is not the tokenizer that this run was trained with"):
        load_run_tokenizer(settings(tmp_path), "0" * 64, given=str(tmp_path))
    with pytest.raises(DataError, match=r"name the tokenizer\.json beside the prepared data"):
        load_run_tokenizer(settings(tmp_path), "0" * 64, given="bytes")
    with pytest.raises(DataError, match="name its file with --tokenizer"):
        load_run_tokenizer(settings(tmp_path, path=str(tmp_path)), "0" * 64)


def test_given_by_hand(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer.json", 300)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(tmp_path / "tokenizer.json", elsewhere / "moved.json")
    wanted = digest(elsewhere / "moved.json")
    found = load_run_tokenizer(settings(tmp_path), wanted, given=str(elsewhere / "moved.json"))
    assert found.vocab_size == 300
