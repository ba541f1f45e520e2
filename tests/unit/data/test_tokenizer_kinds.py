"""Tokenizers a corpus can be prepared with."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_corpora import (
    documents,
    make_texts,
    prepare,
    request,
    save_sentencepiece,
    save_tokenizer,
    write_lines,
)
from tokenizers import Tokenizer

from hysparse_megatron.config.schema import DataConfig
from hysparse_megatron.data.prepare.cached import prepare_corpus
from hysparse_megatron.data.prepare.run import prepare as run_request
from hysparse_megatron.data.run_tokenizer import load_file
from hysparse_megatron.data.tokenizer import (
    END_OF_DOCUMENT,
    ByteTokenizer,
    bytes_tokenizer,
    load_tokenizer,
)
from hysparse_megatron.data.tokenizer_choice import choose_tokenizer
from hysparse_megatron.errors import DataError

TEXTS = make_texts(60)


@settings(max_examples=50)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_bytes_are_what_their_tokenizer_json_gives(text: str) -> None:
    kept = Tokenizer.from_str(bytes_tokenizer().to_str())
    kept.encode_special_tokens = True
    ids = ByteTokenizer().encode_batch([text])[0].tolist()
    assert ids == list(text.encode())
    assert kept.encode(text).ids == ids
    assert kept.decode(ids) == text


def test_training_reads_what_bytes_prepared(tmp_path: Path) -> None:
    made = prepare(tmp_path / "out", write_lines(tmp_path / "a.jsonl", TEXTS))
    assert (made.vocab_size, made.end_of_document) == (257, 256)
    tokenizer = load_tokenizer(made.tokenizer_path)
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    assert prepare_corpus(DataConfig(path=str(tmp_path / "out")), 1) == made


def test_what_was_published_with_a_tokenizer_travels_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    folder.mkdir()
    save_tokenizer(folder / "tokenizer.json")
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    plain = prepare(tmp_path / "plain", source, tokenizer=folder)
    assert not (tmp_path / "plain" / "tokenizer_config.json").exists()
    beside = {
        "tokenizer_config.json": b'{"eos_token": "a", "chat_template": "{{ 1 }}"}',
        "chat_template.jinja": "{{ messages }}\u00e9".encode(),
    }
    for name, contents in {**beside, "notes.txt": b"mine"}.items():
        (folder / name).write_bytes(contents)
    options = {"tokenizer": choose_tokenizer(str(folder), END_OF_DOCUMENT)}
    made = run_request(dataclasses.replace(request(tmp_path / "out", source), **options))
    assert made is not None
    assert made.fingerprint == plain.fingerprint, "no id depends on it"
    for name, contents in beside.items():
        assert (tmp_path / "out" / name).read_bytes() == contents
    assert not (tmp_path / "out" / "notes.txt").exists()
    # What closed the documents counts, not what was published.
    assert load_tokenizer(made.tokenizer_path).end_name == "a"
    assert load_file(Path(made.tokenizer_path)).end_of_document == plain.end_of_document


def test_sentencepiece(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = save_sentencepiece(folder / "tokenizer.model")
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    made = prepare(tmp_path / "out", source, tokenizer=folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert (made.vocab_size, made.end_of_document) == (120, model.eos_id())
    found = documents(made.train_prefix) + documents(made.validation_prefix)
    expected = [[*model.encode(text), model.eos_id()] for text in TEXTS]
    assert sorted(found) == sorted(expected)
    assert Path(made.tokenizer_path).read_bytes() == path.read_bytes()
    assert made.tokenizer_path.endswith("out/tokenizer.model")


def test_sentencepiece_refusals(tmp_path: Path) -> None:
    path = tmp_path / "bad.model"
    with pytest.raises(DataError, match=r"bad\.model: cannot read the tokenizer: No such file"):
        choose_tokenizer(str(path)).load()
    path.write_bytes(b"no model")
    with pytest.raises(DataError, match=r"bad\.model: not a SentencePiece model"):
        choose_tokenizer(str(path)).load()
    good = str(save_sentencepiece(tmp_path / "good.model"))
    assert choose_tokenizer(good, "<s>").load().end_of_document == 1
    with pytest.raises(DataError, match="looked for <none>"):
        choose_tokenizer(good, "<none>").load()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither .*save_pretrained"):
        choose_tokenizer(str(tmp_path))


def test_large_vocabularies_take_four_bytes_a_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(save_tokenizer(tmp_path / "tokenizer.json")))
    tokenizer.add_tokens([f"<extra {number}>" for number in range(65_500)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    made = prepare(
        tmp_path / "out",
        write_lines(tmp_path / "a.jsonl", [*TEXTS, "<extra 65499>"]),
        tokenizer=tmp_path,
    )
    tokens = np.fromfile(f"{made.train_prefix}.bin", np.int32)
    assert tokens.max() > 65_500 or np.fromfile(f"{made.validation_prefix}.bin", np.int32).max()
    assert len(tokens) == made.train_tokens
