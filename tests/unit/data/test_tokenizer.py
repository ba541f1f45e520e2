from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from hysparse_megatron.data import TextTokenizer, load_tokenizer, train_tokenizer
from hysparse_megatron.data.tokenizer import END_OF_DOCUMENT, sample_evenly
from hysparse_megatron.errors import DataError

TEXTS = ["def add(a, b):\n    return a + b\n" * 20, "The quick naïve 東京 fox.\r\n\tjumps " * 30]
TOKENIZER = TextTokenizer(train_tokenizer(TEXTS, 290))


@settings(deadline=None, max_examples=200)
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


def test_vocabulary_has_every_byte_and_end_of_document_first() -> None:
    assert TOKENIZER.end_of_document == 0
    assert TOKENIZER.vocab_size == 290
    # A corpus with one pair to merge gives one id more than the bytes, whatever is asked for.
    assert TextTokenizer(train_tokenizer(["ab"], 4096)).vocab_size == 258
    with pytest.raises(DataError, match="256 is too small"):
        train_tokenizer(TEXTS, 256)


def test_training_is_the_same_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from hysparse_megatron.data.tokenizer import train_tokenizer\n"
        "texts = eval(sys.stdin.read())\n"
        "sys.stdout.write(train_tokenizer(texts, 400).to_str())\n"
    )
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        input=repr(TEXTS),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert child.stdout == train_tokenizer(TEXTS, 400).to_str()


def test_documents_above_the_piece_size_are_cut_at_line_ends() -> None:
    text = ("x = 1\n" * 50_000) * 5  # 1.5 M characters
    ids = TOKENIZER.encode_batch(["short", text, ""])
    assert TOKENIZER.decode(ids[1]) == text
    assert ids[0].tolist() == TOKENIZER.encode("short")
    assert len(ids[2]) == 0
    assert ids[1].dtype == np.int64


def test_a_megabyte_without_a_space_is_trained_on_in_seconds() -> None:
    text = random.Random(0).randbytes(500_000).hex()
    start = time.monotonic()
    train_tokenizer([text], 400)
    assert time.monotonic() - start < 20


def test_sample_is_spread_evenly() -> None:
    texts = [f"{number:03d}" + "x" * 997 for number in range(100)]
    sample = list(sample_evenly(texts, total_bytes=100_000, max_bytes=10_000))
    numbers = [int(text[:3]) for text in sample]
    assert 9 <= len(numbers) <= 10
    assert set(np.diff(numbers)) == {10}
    assert list(sample_evenly(texts, total_bytes=100_000, max_bytes=10**9)) == texts
    one = list(sample_evenly(["line\n" * 200_000], total_bytes=10**6, max_bytes=300_000))
    assert 200_000 <= sum(map(len, one)) <= 300_000


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the tokenizer: No such file"),
        (b"{}", "not a tokenizer.json"),
        (b"", "not a tokenizer.json"),
        (b"\xff\xfe", "bad UTF-8 at offset 0"),
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
