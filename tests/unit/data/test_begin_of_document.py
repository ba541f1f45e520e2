"""What documents begin with: the tokenizer's own token, another one, or none."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from prepared_corpora import (
    documents,
    make_texts,
    request,
    save_beginning_tokenizer,
    save_sentencepiece,
    save_tokenizer,
    write_lines,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hysparse_megatron.config.schema import DataConfig
from hysparse_megatron.data.card import PreparedCorpus, load_prepared
from hysparse_megatron.data.prepare import run
from hysparse_megatron.data.prepare.cached import prepare_corpus
from hysparse_megatron.data.prepare.verify import verify_prepared
from hysparse_megatron.data.run_tokenizer import load_file
from hysparse_megatron.data.sources import changed_fields, load_blend, load_data, load_evaluations
from hysparse_megatron.data.tokenizer import NO_TOKEN, load_tokenizer
from hysparse_megatron.data.tokenizer_choice import choose_tokenizer
from hysparse_megatron.errors import DataError
from hysparse_megatron.huggingface import tokenizer_files

TEXTS = make_texts(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published tokenizer that begins every text with `<s>`."""
    made = tmp_path_factory.mktemp("published")
    save_beginning_tokenizer(made / "tokenizer.json")
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (made / "tokenizer_config.json").write_text(json.dumps(described))
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("text") / "a.jsonl", TEXTS)


def prepared(output: Path, source: Path, folder: Path, begin: str | None = None) -> PreparedCorpus:
    tokenizer = choose_tokenizer(str(folder), None, begin)
    made = run.prepare(replace(request(output, source), tokenizer=tokenizer))
    assert made is not None
    return verify_prepared(made.directory, lambda line: None)


def all_documents(made: PreparedCorpus) -> list[list[int]]:
    return sorted(documents(made.train_prefix) + documents(made.validation_prefix))


def test_documents_are_what_transformers_reads(folder: Path, source: Path, tmp_path: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs("a").input_ids[0] == theirs.bos_token_id
    made = prepared(tmp_path / "out", source, folder)
    assert made.begin_of_document == theirs.bos_token_id
    end = made.end_of_document
    assert all_documents(made) == sorted([*theirs(text).input_ids, end] for text in TEXTS)
    assert made.identity()["begin_of_document"] == theirs.bos_token_id

    plain = prepared(tmp_path / "plain", source, folder, NO_TOKEN)
    assert plain.begin_of_document is None
    bare = [[*theirs(text, add_special_tokens=False).input_ids, end] for text in TEXTS]
    assert all_documents(plain) == sorted(bare)
    assert "begin_of_document" not in plain.identity()

    other = prepared(tmp_path / "other", source, folder, "<t>")
    assert {document[0] for document in all_documents(other)} == {
        theirs.convert_tokens_to_ids("<t>")
    }
    with pytest.raises(DataError, match=r"tokenizer\.json: no begin-of-document token; .* foo"):
        prepared(tmp_path / "foo", source, folder, "foo")
    with pytest.raises(DataError, match=r"would begin with <\|endoftext\|>, which closes them"):
        prepared(tmp_path / "end", source, folder, "<|endoftext|>")


def test_a_text_cannot_spell_it_out(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer.encode("<s>x<s>")
    assert tokenizer.begin_of_document not in ids
    assert tokenizer.encode_prompt("<s>x<s>") == [tokenizer.begin_of_document, *ids]


@pytest.mark.parametrize(
    ("template", "begin", "left"),
    [
        ("$A", None, []),
        ("<s> $A", "<s>", []),
        ("<s> $A <|endoftext|>", "<s>", []),
        ("<s> $A <t>", "<s>", ["<t>"]),
        ("<s> <t> $A", None, ["<s>", "<t>"]),
        # One token would end a document before every one.
        ("<|endoftext|> $A", None, ["<|endoftext|>"]),
    ],
)
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_the_post_processor_alone_counts(
    template: str, begin: str | None, left: list[str], add_bos: bool | None, tmp_path: Path
) -> None:
    """As in transformers, whatever the configuration beside a tokenizer.json says."""
    path = save_beginning_tokenizer(tmp_path / "tokenizer.json", template)
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    described |= {} if add_bos is None else {"add_bos_token": add_bos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    found = load_tokenizer(str(path))
    assert found.begin_name == begin
    assert tokenizer_files.not_reproduced(path) == left
    for theirs in (AutoTokenizer, PreTrainedTokenizerFast):
        ids = theirs.from_pretrained(tmp_path)("a word").input_ids
        before, after = found.added_around()
        assert ids == [*before, *found.encode("a word"), *after]


def test_sentencepiece_goes_by_what_lies_beside(source: Path, tmp_path: Path) -> None:
    path = str(save_sentencepiece(tmp_path / "tokenizer.model"))
    beside = tmp_path / "tokenizer_config.json"

    def begin(name: str | None = None) -> str | None:
        return choose_tokenizer(path, None, name).load().begin_name

    assert begin() is None
    for described, expected in [
        ({"add_bos_token": True, "bos_token": {"content": "<s>"}}, "<s>"),
        ({"add_bos_token": True}, "<s>"),
        ({"add_bos_token": True, "bos_token": "</s>"}, None),
        ({"add_bos_token": False, "bos_token": "<s>"}, None),
    ]:
        beside.write_text(json.dumps(described))
        assert begin() == expected
    assert begin("<s>") == "<s>"
    with pytest.raises(DataError, match=r"tokenizer\.model: no begin-of-document token; .* <foo>"):
        begin("<foo>")
    beside.write_text('{"add_bos_token": true}')
    assert begin(NO_TOKEN) is None
    made = prepared(tmp_path / "out", source, tmp_path)
    assert {document[0] for document in all_documents(made)} == {made.begin_of_document}


def test_both_parts_of_a_text_that_is_cut_begin_with_it(folder: Path, tmp_path: Path) -> None:
    text = "\n\n".join(make_texts(30))
    source = write_lines(tmp_path / "one.jsonl", [text])
    made = prepared(tmp_path / "out", source, folder)
    [first], [rest] = documents(made.train_prefix), documents(made.validation_prefix)
    begin = made.begin_of_document
    assert first[0] == rest[0] == begin
    tokenizer = load_tokenizer(str(folder))
    assert [*first[1:-1], *rest[1:-1]] == tokenizer.encode(text)
    assert (len(first), len(rest)) == (made.train_tokens, made.validation_tokens)
    short = write_lines(tmp_path / "short.jsonl", ["a"])
    with pytest.raises(DataError, match="none of 1 document"):
        prepared(tmp_path / "short", short, folder)


def test_cards_and_tokens_of_before_have_none(folder: Path, source: Path, tmp_path: Path) -> None:
    """Also where the tokenizer begins texts with one; and they are not prepared anew for others."""
    made = prepared(tmp_path / "out", source, folder, NO_TOKEN)
    card = tmp_path / "out" / "dataset.json"
    described = json.loads(card.read_text())
    del described["begin_of_document"]
    assert "begin_of_document" not in described["options"]
    card.write_text(json.dumps(described))
    assert load_prepared(made.directory) == made
    assert choose_tokenizer(made.directory).begin_of_document == NO_TOKEN
    assert load_file(Path(made.tokenizer_path)).begin_of_document is None
    # Text that is evaluated on is read as this was.
    settings = DataConfig(evaluation={"text": str(source)}, cache_dir=str(tmp_path / "cache"))
    assert load_evaluations(settings, made)["text"].begin_of_document is None

    data = DataConfig(path=str(source), cache_dir=str(tmp_path / "cache"), tokenizer=str(folder))
    before = prepare_corpus(data, begin_of_document=NO_TOKEN)
    assert before.begin_of_document is None
    now = prepare_corpus(data)
    assert now.begin_of_document is not None
    assert now.directory != before.directory
    # A run of before goes on when the earlier entry of the cache is named.
    named = load_data(replace(data, path=before.directory))
    assert changed_fields(before.identity(), named.identity()) == []


def test_requests_for_other_tokenizers_are_what_they_were(source: Path, tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path / "tokenizer.json")
    asked = request(tmp_path / "out", source, tokenizer=path).shard_options()
    assert asked.keys() == {
        "format", "text_key", "max_document_bytes", "unit_bytes",
        "tokenizer_sha256", "tokenizers", "end_of_document",
    }  # fmt: skip


def test_what_is_read_together_begins_alike(folder: Path, source: Path, tmp_path: Path) -> None:
    made = prepared(tmp_path / "out", source, folder)
    plain = prepared(tmp_path / "plain", source, folder, NO_TOKEN)
    assert load_blend(f"1 {made.directory}").identity()["begin_of_document"] == (
        made.begin_of_document
    )
    other = f"begin with no token of their own, those of .* with token {made.begin_of_document}: "
    with pytest.raises(DataError, match=other):
        load_blend(f"1 {made.directory}; 1 {plain.directory}")
    settings = DataConfig(evaluation={"plain": plain.directory}, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=rf"data\.evaluation\.plain: .*{other}"):
        load_evaluations(settings, made)


def test_verify_finds_a_document_that_begins_otherwise(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    made = prepared(tmp_path / "out", source, folder)
    card = tmp_path / "out" / "dataset.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"begin_of_document": 7}))
    found = rf"document 0 begins with token {made.begin_of_document} at offset 0, expected 7"
    with pytest.raises(DataError, match=found):
        verify_prepared(made.directory, lambda line: None)
    card.write_text(json.dumps(json.loads(card.read_text()) | {"begin_of_document": "7"}))
    with pytest.raises(DataError, match="'begin_of_document' is '7'"):
        load_prepared(made.directory)
