import json
import random
import re
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

import hysparse_megatron.data.tokenizer
from hysparse_megatron.data.prepare import request
from hysparse_megatron.data.tokenizer import (
    END_OF_DOCUMENT,
    TextTokenizer,
    bytes_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from hysparse_megatron.errors import ConfigError, DataError
from tests.captured import captured

TEXTS = ["def add(a, b):\n    return a + b\n" * 20, "The quick naïve 東京 fox.\r\n\tjumps " * 30]
TOKENIZER = TextTokenizer(train_tokenizer(TEXTS, 290))


@settings(max_examples=200)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_round_trip_on_any_unicode_text(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= i < TOKENIZER.vocab_size for i in ids)
    assert TOKENIZER.end_of_document not in ids


def test_round_trip_on_random_bytes(seed: int) -> None:
    text = random.Random(seed).randbytes(20_000).decode("utf-8", errors="ignore")
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_special_token_in_text_is_ordinary_text() -> None:
    text = f"a {END_OF_DOCUMENT} b"
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.end_of_document not in ids
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode([TOKENIZER.end_of_document]) == END_OF_DOCUMENT


def test_a_text_cannot_end_a_document_that_its_tokenizers_file_lets_it_end() -> None:
    described = json.loads(bytes_tokenizer().to_str())
    [end] = described["added_tokens"]
    end["special"] = False
    tokenizer = TextTokenizer(Tokenizer.from_str(json.dumps(described)))
    ids = tokenizer.encode(text := f"a{END_OF_DOCUMENT}b")
    assert tokenizer.end_of_document == end["id"] not in ids
    assert tokenizer.decode(ids) == text


def test_vocabulary_has_every_byte_and_end_of_document_first() -> None:
    assert TOKENIZER.end_of_document == 0
    assert TOKENIZER.vocab_size == 290
    # A corpus with one pair to merge gives one id more than the bytes, whatever is asked for.
    assert TextTokenizer(train_tokenizer(["ab"], 4096)).vocab_size == 258
    with pytest.raises(ConfigError, match="a tokenizer of 256 ids"):
        train_tokenizer(TEXTS, 256)


def test_training_is_the_same_in_another_process() -> None:
    code = (
        "import sys\n"
        "from hysparse_megatron.data.tokenizer import train_tokenizer\n"
        "texts = eval(sys.stdin.read())\n"
        "sys.stdout.write(train_tokenizer(texts, 400).to_str())\n"
    )
    child = captured([sys.executable, "-W", "ignore", "-c", code], input=repr(TEXTS), timeout=60)
    assert child.stdout == train_tokenizer(TEXTS, 400).to_str()


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_of_a_long_text_are_those_of_the_whole(
    prefix: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a tokenizer that puts a space before every text it is given."""
    monkeypatch.setattr(hysparse_megatron.data.tokenizer, "_WINDOW", 1 << 14)
    monkeypatch.setattr(hysparse_megatron.data.tokenizer, "_OVERLAP", 1 << 11)
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdeéж東 \n  ", k=9)) for _ in range(500)]
    text = "".join(generator.choices(words, k=10_000 + generator.randint(0, 9999)))
    assert len(text) > 5 << 14
    raw = Tokenizer.from_str(train_tokenizer(words, 400).to_str())
    raw.pre_tokenizer = (
        pre_tokenizers.Metaspace() if prefix else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    tokenizer = TextTokenizer(raw)
    found = tokenizer.encode_batch(["short", text, ""])
    assert found[1].tolist() == raw.encode(text, add_special_tokens=False).ids
    assert found[0].tolist() == tokenizer.encode("short")
    assert len(found[2]) == 0
    endless = "ab" * 20_000  # no place at which windows could agree on its own
    assert tokenizer.encode(endless) == raw.encode(endless, add_special_tokens=False).ids


def test_a_megabyte_without_a_space_is_trained_on_in_seconds() -> None:
    text = random.Random(0).randbytes(500_000).hex()
    start = time.process_time()
    train_tokenizer([text], 400)
    assert time.process_time() - start < 20


@pytest.mark.parametrize("shape", ["lines", "files", "one file"])
def test_sample_is_spread_evenly(
    tmp_path: Path, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a corpus larger than what a tokenizer is trained on."""
    monkeypatch.setattr(request, "_TRAINING_BYTES", 400_000)
    texts = [f"{number:04d}" + "x" * 9_996 for number in range(400)]
    if shape == "lines":
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / "a.jsonl").write_text("".join(lines))
    elif shape == "files":
        for number, text in enumerate(texts):
            (tmp_path / f"{number:04d}.txt").write_text(text)
    else:
        (tmp_path / "a.txt").write_text("".join(texts))
    sources, _ = request.sources_of([str(tmp_path)], "/nowhere")
    sample = list(request._sample(request.PrepareRequest(sources, "/nowhere", None, 300)))
    assert 300_000 < sum(map(len, sample)) < 520_000
    numbers = [int(found) for text in sample for found in re.findall(r"\d{4}", text)]
    assert numbers == sorted(numbers)
    assert {number // 100 for number in numbers} == {0, 1, 2, 3}


def test_load_accepts_file_or_folder(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path))
    for given_path in (path, tmp_path):
        loaded = load_tokenizer(str(given_path))
        assert loaded.vocab_size == 300
        assert loaded.decode(loaded.encode(TEXTS[1])) == TEXTS[1]


def test_load_finds_other_names_of_end_of_document(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    text = train_tokenizer(TEXTS, 300).to_str().replace(END_OF_DOCUMENT, "</s>")
    Tokenizer.from_str(text).save(str(path))
    assert load_tokenizer(str(path)).end_of_document == 0


def test_a_tokenizers_own_end_comes_before_names_that_others_use(tmp_path: Path) -> None:
    """As in Llama 2's, to which somebody added a token of GPT-2's name."""
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.from_str(train_tokenizer(TEXTS, 300).to_str())
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(path))
    assert load_tokenizer(str(path)).end_of_document == 0
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps({"eos_token": {"content": "</s>"}}))
        loaded = load_tokenizer(str(path))
        assert loaded.end_of_document == tokenizer.token_to_id("</s>")
        assert loaded.end_name == "</s>"
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert load_tokenizer(str(path)).end_name == "</s>"
    assert load_tokenizer(str(path), "<|endoftext|>").end_of_document == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the tokenizer: No such file"),
        (b"{}", "not a tokenizer.json"),
        (b"", "not a tokenizer.json"),
        (b"\xff\xfe", "invalid start byte"),
    ],
)
def test_bad_tokenizer_file_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(str(path))
    assert str(path) in str(caught.value)


def test_tokenizer_without_end_of_document_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    text = train_tokenizer(TEXTS, 300).to_str().replace(END_OF_DOCUMENT, "<pad>")
    Tokenizer.from_str(text).save(str(path))
    with pytest.raises(DataError, match="no end-of-document token"):
        load_tokenizer(str(path))
