import re
from pathlib import Path

import pytest

from hysparse_megatron.data.places import is_local
from hysparse_megatron.data.prepare.readers import read_piece
from hysparse_megatron.data.prepare.sources import cut_units, list_sources
from hysparse_megatron.errors import DataError


def read(path: Path, text_key: str = "text") -> list[str]:
    """Texts of a file or folder; raises what is wrong with a document."""
    sources = list_sources([str(path)])
    found = []
    for unit in cut_units(sources, 1 << 20):
        for piece in unit:
            for text in read_piece(sources[piece.source], piece, text_key, 1 << 20):
                if isinstance(text, DataError):
                    raise text
                found.append(text)
    return found


def test_folder_mixes_text_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").write_bytes(b"\xff")
    (tmp_path / "b.md").write_bytes("\ufeff# naïve\r\n".encode())
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "sub" / "a.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "two"}')
    assert read(tmp_path) == ["# naïve\r\n", "", "one", "", "", "two"]


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


def test_missing_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt: cannot be read: No such file"):
        read(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="no files to read"):
        read(tmp_path)


def test_a_name_with_two_colons_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a folder, by itself, from where it lies, and beside one that fsspec would read."""
    names = ("a", "a::b", "file::a", "memory::x.txt", "List::Util.txt", "std::vector")
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).write_text(f"text of {name}")
    assert sorted(read(tmp_path / "in")) == sorted(f"text of {name}" for name in names)
    monkeypatch.chdir(tmp_path / "in")
    for name in names:
        assert read(Path(name)) == read(tmp_path / "in" / name) == [f"text of {name}"]
    with pytest.raises(DataError, match=r"in/std::map: cannot be read: No such file"):
        read(Path("std::map"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("s3::x", True),
        ("sub/memory::memory://x", True),
        ("/sub/zip://x", True),
        ("unknown::s3://bucket", True),
        ("s3://bucket/x", False),
        ("unknown://bucket", False),
        ("zip://a.txt::s3://bucket/x.zip", False),
        ("simplecache::s3://bucket/x", False),
    ],
)
def test_what_is_a_url(path: str, expected: bool) -> None:
    assert is_local(path) == expected


@pytest.mark.parametrize("name", ["a.gz", "a.txt.gz", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_failed_download_is_no_empty_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=re.escape(f"{name}: ")):
        read(tmp_path / name)


def test_other_text_key(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"content": "x"}\n')
    assert read(file, text_key="content") == ["x"]
