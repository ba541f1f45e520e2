from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hysparse_megatron.data import ReadCounts, open_corpus
from hysparse_megatron.errors import DataError


def read(path: Path | None, **options: object) -> tuple[list[tuple[str, str]], ReadCounts]:
    counts = ReadCounts()
    corpus = open_corpus(None if path is None else str(path), **options)  # type: ignore[arg-type]
    return [(document.name, document.text) for document in corpus.read(counts)], counts


def test_standard_library_is_sorted_and_leaves_out_tests_and_installed_packages() -> None:
    corpus = open_corpus(None)
    names = [file.name for file in corpus.files]
    assert names == sorted(names)
    assert len(names) == len(set(names))
    assert {"abc.py", "asyncio/__init__.py", "json/decoder.py"} <= set(names)
    forbidden = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    assert not [name for name in names if forbidden & set(name.split("/"))]
    assert all(name.endswith(".py") for name in names)
    assert corpus.identity == open_corpus(None).identity


def test_max_bytes_stops_before_the_document_that_exceeds_it() -> None:
    everything, _ = read(None, max_bytes=100_000)
    assert sum(len(text.encode()) for _, text in everything) <= 100_000
    less, counts = read(None, max_bytes=50_000)
    assert 0 < len(less) < len(everything)
    assert everything[: len(less)] == less
    assert counts.documents == len(less)
    with pytest.raises(DataError, match="limit: 1 bytes"):
        read(None, max_bytes=1)


def test_folder_mixes_text_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").write_bytes(b"\xff")
    (tmp_path / "b.md").write_bytes("\ufeff# naïve\r\n".encode())
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "sub" / "a.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "two"}')
    documents, counts = read(tmp_path)
    assert documents == [
        ("b.md", "# naïve\r\n"),
        ("sub/a.jsonl:1", "one"),
        ("sub/a.jsonl:4", "two"),
    ]
    assert (counts.documents, counts.empty_documents, counts.bad_documents) == (3, 3, 0)


def test_identity_sees_changes_and_not_the_place(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = open_corpus(str(file)).identity
    moved = tmp_path / "elsewhere" / "a.txt"
    moved.parent.mkdir()
    file.rename(moved)
    assert open_corpus(str(moved)).identity == before
    moved.write_text("other")
    assert open_corpus(str(moved)).identity != before


BAD_LINES = [
    (b'{"text": "ok"}\n{"text": \n', "bad.jsonl:2: not a JSON object, line at offset 15"),
    (b'{"text": "ok"}\n[1]\n', "bad.jsonl:2: expected a JSON object, got list"),
    (b'{"body": "x"}\n', "bad.jsonl:1: missing field 'text', line at offset 0; fields found: body"),
    (b'{"text": 3}\n', "bad.jsonl:1: field 'text' is int, expected a string"),
    (b'{"text": "\\ud800"}\n', "bad.jsonl:1: field 'text' holds a lone surrogate"),
    (b'{"text": "ok"}\n{"text": "\xff"}\n', "bad.jsonl:2: bad UTF-8 (byte 0xff) at offset 25"),
    (b"[" * 100_000, "bad.jsonl:1: not a JSON object"),
]


@pytest.mark.parametrize(("content", "message"), BAD_LINES)
def test_bad_line_is_refused_by_file_line_and_offset(
    tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read(file)
    assert str(file) in str(caught.value)
    assert caught.value.exit_code == 5


def test_bad_utf8_text_names_the_offset(tmp_path: Path) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes(b"abc\xc3(")
    with pytest.raises(DataError, match=r"bad\.txt: bad UTF-8 \(byte 0xc3\) at offset 3"):
        read(file)
    file.write_bytes(b"\xef\xbb\xbfabc\xff")
    with pytest.raises(DataError, match="at offset 6"):
        read(file)


def test_bad_documents_are_counted_up_to_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "mixed.jsonl"
    lines = [json.dumps({"text": "fine"}), "{", "{", json.dumps({"text": "good"})]
    file.write_text("\n".join(lines))
    documents, counts = read(file, max_bad_documents=2)
    assert [text for _, text in documents] == ["fine", "good"]
    assert counts.bad_documents == 2
    with pytest.raises(DataError, match=r"mixed\.jsonl:3: .*bad document number 2, 1 allowed"):
        read(file, max_bad_documents=1)


def test_missing_or_empty_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt: cannot be read: No such file"):
        open_corpus(str(tmp_path / "nowhere.txt"))
    with pytest.raises(DataError, match="no files to read"):
        open_corpus(str(tmp_path))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="no document with text in 1 file"):
        read(tmp_path)


def test_other_text_key(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"content": "x"}\n')
    assert read(file, text_key="content")[0] == [("a.jsonl:1", "x")]
