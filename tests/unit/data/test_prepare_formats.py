"""Every kind of input gives the same documents, wherever it is cut."""

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from backports import zstd
from prepared_corpora import (
    all_texts,
    byte_texts,
    contents,
    documents,
    make_texts,
    prepare,
    request,
    save_tokenizer,
    write_arrow,
    write_gzip,
    write_lines,
    write_parquet,
    write_zstd,
)

from hysparse_megatron.data.card import load_prepared
from hysparse_megatron.data.prepare import run, tokenize
from hysparse_megatron.data.prepare.assemble import held_out
from hysparse_megatron.data.prepare.shards import Work
from hysparse_megatron.data.tokenizer import load_tokenizer
from hysparse_megatron.errors import DataError
from tests.token_files import write_indexed

TEXTS = make_texts(300)


WRITERS: dict[str, Callable[[Path], Path]] = {
    "gz": lambda folder: write_gzip(folder / "a.jsonl.gz", TEXTS),
    "zst": lambda folder: write_zstd(folder / "a.jsonl.zst", TEXTS),
    "parquet": lambda folder: write_parquet(folder / "a.parquet", TEXTS),
    "parquet with one row group": lambda folder: write_parquet(folder / "a.parquet", TEXTS, 1000),
    "parquet of views": lambda folder: write_parquet(
        folder / "a.parquet", TEXTS, kind=pa.string_view()
    ),
    "parquet of a dictionary": lambda folder: write_parquet(
        folder / "a.parquet", TEXTS, kind=pa.dictionary(pa.int32(), pa.string())
    ),
    "large strings": lambda folder: write_parquet(
        folder / "a.parquet", TEXTS, kind=pa.large_string()
    ),
    "capitals": lambda folder: write_lines(folder / "a.JSONL", TEXTS),
    "ndjson": lambda folder: write_lines(folder / "a.ndjson", TEXTS),
    "json": lambda folder: write_lines(folder / "a.json", TEXTS),
    "arrow": lambda folder: write_arrow(folder / "saved", TEXTS),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files prepared from plain JSON lines, checked against Megatron's own writer."""
    folder = tmp_path_factory.mktemp("plain")
    tokenizer = save_tokenizer(folder / "tokenizer.json")
    prepared = prepare(folder / "out", write_lines(folder / "a.jsonl", TEXTS), tokenizer=tokenizer)
    encoder = load_tokenizer(str(tokenizer))
    expected = [[*encoder.encode(text), encoder.end_of_document] for text in TEXTS]
    held = documents(prepared.validation_prefix)
    assert 30 < len(held) < 90
    for split, wanted in (
        ("train", [d for d in expected if d not in held]),
        ("validation", [d for d in expected if d in held]),
    ):
        assert documents(str(folder / "out" / split)) == wanted
        write_indexed(str(folder / split), wanted, prepared.vocab_size)
        for suffix in ("bin", "idx"):
            written = (folder / "out" / f"{split}.{suffix}").read_bytes()
            assert written == (folder / f"{split}.{suffix}").read_bytes()
    return contents(folder / "out")


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_files_of_plain_lines(
    tmp_path: Path, kind: str, plain: dict[str, bytes]
) -> None:
    source = WRITERS[kind](tmp_path)
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json")
    prepare(tmp_path / "out", source, tokenizer=tokenizer)
    found = contents(tmp_path / "out")
    for name in plain.keys() - {"dataset.json"}:
        assert found[name] == plain[name], name


@pytest.mark.parametrize("unit_bytes", [1, 7, 100, 5000, 10**9])
def test_lines_are_whole_wherever_a_file_is_cut(tmp_path: Path, unit_bytes: int) -> None:
    texts = ["a", "bc" * 40, "naïve 東京", "x" * 300, "", "end"]
    source = write_lines(tmp_path / "a.jsonl", texts[:3] if unit_bytes == 1 else texts)
    with source.open("rb+") as stream:  # no line end after the last line
        stream.seek(-1, 2)
        stream.truncate()
    prepared = prepare(
        tmp_path / "out", source, unit_bytes=unit_bytes, validation_fraction=0.5, seed=2
    )
    expected = texts[:3] if unit_bytes == 1 else texts
    assert all_texts(prepared) == sorted(text for text in expected if text)
    assert prepared.empty_documents == expected.count("")


@pytest.mark.parametrize("compression", [None, "gz"])
def test_a_long_text_file_is_one_document(tmp_path: Path, compression: str | None) -> None:
    generator = random.Random(1)
    text = "\ufeff" + "".join(generator.choices("abcжди東京🙂 \n", k=1_100_000))
    folder = tmp_path / "texts"
    folder.mkdir()
    if compression:
        (folder / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (folder / "b.txt").write_bytes(text.encode())
    for number, short in enumerate(TEXTS[:20]):
        (folder / f"a{number:02d}.txt").write_text(short)
    (folder / "c.txt").touch()
    prepared = prepare(folder.parent / "out", folder, unit_bytes=500_000, deduplicate=True)
    assert all_texts(prepared) == sorted([*TEXTS[:20], text[1:]])
    assert prepared.empty_documents == 1


def test_bad_utf8_deep_in_a_text_file_drops_the_whole_file(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    bad = "line of text\n" * 2000
    (folder / "a.txt").write_bytes(bad.encode() + b"ok\xff" + bad.encode() + b"\xff")
    for number, short in enumerate(TEXTS[:20]):
        (folder / f"b{number:02d}.txt").write_text(short)
    prepared = prepare(tmp_path / "out", folder, max_bad=1)
    assert all_texts(prepared) == sorted(TEXTS[:20])
    assert prepared.bad_documents == 1
    card = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert f"a.txt: bad UTF-8 (byte 0xff) at offset {len(bad) + 2}" in card["bad_samples"][0]
    assert card["text_bytes"] == sum(len(text.encode()) for text in TEXTS[:20])


def test_duplicates_are_those_a_set_finds(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    texts = generator.choices(make_texts(200, longest_words=30), k=500)
    long = "a line of a long file\n" * 1000
    folder = tmp_path / "in"
    folder.mkdir()
    write_lines(folder / "b.jsonl", texts)
    for name in ("a.txt", "c.txt"):
        (folder / name).write_text(long)
    (folder / "d.txt").write_text(texts[0])
    prepared = prepare(tmp_path / "out", folder, deduplicate=True)
    expected = list(dict.fromkeys([long, *texts]))
    assert all_texts(prepared) == sorted(expected)
    held = byte_texts(prepared.validation_prefix)
    assert held == [text for text in expected if text in held]
    card = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert card["duplicate_documents"] == 503 - len(expected)
    everything = prepare(tmp_path / "all", folder)
    assert all_texts(everything) == sorted([long, *texts, long, texts[0]])
    # Copies never lie in both splits.
    assert not set(byte_texts(everything.train_prefix)) & set(
        byte_texts(everything.validation_prefix)
    )


def test_the_split_has_the_wanted_size_and_follows_the_seed() -> None:
    keys = np.random.default_rng(0).integers(0, 2**63, (100_000, 2), dtype=np.uint64)
    one, other = held_out(keys, 1, 0.03), held_out(keys, 2, 0.03)
    assert abs(one.mean() - 0.03) < 0.003
    assert abs((one & other).mean() - 0.03**2) < 0.0006
    counted = np.stack([np.arange(100_000), np.zeros(100_000)], axis=1).astype(np.uint64)
    assert abs(held_out(counted, 1, 0.03).mean() - 0.03) < 0.003


BAD_LINES = [
    (b"{", "not a JSON object"),
    (b"[1]", "expected a JSON object, got list"),
    (b'{"other": 1}', "missing field 'text'"),
    (b'{"text": 1}', "field 'text' is int"),
    (b'{"text": "\xff"}', "bad UTF-8 (byte 0xff)"),
    (b'{"text": "' + b"x" * 3000 + b'"}', "longer than 2,000 bytes"),
]


def test_bad_lines_are_counted_sampled_and_limited(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", TEXTS[:40])
    good = source.read_bytes()
    source.write_bytes(good + b"".join(line + b"\n\n" for line, _ in BAD_LINES) + good)
    options = {"max_document_bytes": 2000}
    prepared = prepare(tmp_path / "out", source, max_bad=len(BAD_LINES), **options)
    assert all_texts(prepared) == sorted(TEXTS[:40] * 2)
    assert (prepared.bad_documents, prepared.empty_documents) == (len(BAD_LINES), len(BAD_LINES))
    samples = json.loads((tmp_path / "out" / "dataset.json").read_text())["bad_samples"]
    place = len(good)
    for (line, message), sample in zip(BAD_LINES, samples, strict=False):
        assert message in sample
        assert f"at offset {place + (line.find(0xFF) if 0xFF in line else 0)}" in sample
        place += len(line) + 2
    for limit in range(len(BAD_LINES)):
        with pytest.raises(DataError, match=rf"{limit + 1} bad .* {limit} allowed.*--max-bad"):
            prepare(tmp_path / f"limit{limit}", source, max_bad=limit, **options)
        assert not (tmp_path / f"limit{limit}").exists()
    # A higher limit goes on from what the lower one left.
    prepare(tmp_path / "limit0", source, max_bad=None, **options)
    assert contents(tmp_path / "limit0") == contents(tmp_path / "out")


def test_null_rows_are_bad_and_wrong_columns_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [*TEXTS[:30], None])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"a\.parquet: row 30: has no text"):
        prepare(tmp_path / "out", path)
    assert prepare(tmp_path / "out", path, max_bad=1).bad_documents == 1
    with pytest.raises(DataError, match="missing column 'body'; columns found: text, other"):
        prepare(tmp_path / "other", path, text_key="body")
    pa.parquet.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(DataError, match="column 'text' is int64, expected strings"):
        prepare(tmp_path / "other", path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "saved/data-a.arrow"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    source = WRITERS[name.rpartition(".")[2]](tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 700] if damage == "cut" else b"garbage" * 100)
    with pytest.raises(DataError, match=path.name.replace(".", r"\.")):
        prepare(tmp_path / "out", source, max_bad=None)
    assert not (tmp_path / "out").exists()


def test_files_without_a_document_add_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_parquet(folder / "a.parquet", [])
    empty = pa.schema([("text", pa.string())])
    with pa.OSFile(str(folder / "b.arrow"), "wb") as sink, pa.ipc.new_stream(sink, empty):
        pass
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b""))
    (folder / "d.jsonl.zst").write_bytes(zstd.compress(b""))
    (folder / "e.jsonl").touch()
    (folder / "f.txt.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match=r"none of 0 document\(s\) with text"):
        prepare(tmp_path / "none", folder)
    assert not (tmp_path / "none").exists()
    write_lines(folder / "g.jsonl", TEXTS[:30])
    prepared = prepare(tmp_path / "out", folder)
    assert all_texts(prepared) == sorted(TEXTS[:30])
    assert prepared.empty_documents == 1


@pytest.mark.parametrize("name", ["_SUCCESS", "empty.jsonl"])
def test_an_empty_file_may_be_the_first(tmp_path: Path, name: str) -> None:
    """As in what Spark writes."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).touch()
    write_lines(folder / "part-0000.jsonl", TEXTS[:30])
    assert all_texts(prepare(tmp_path / "out", folder)) == sorted(TEXTS[:30])


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """A file may have any bytes for a name: here e with an accent in Latin-1."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number, text in enumerate(TEXTS[:20]):
        (folder / os.fsdecode(b"caf\xe9 %02d.txt" % number)).write_text(text)
    prepared = prepare(tmp_path / "out", folder)
    assert all_texts(prepared) == sorted(TEXTS[:20])
    card = json.loads((tmp_path / "out" / "dataset.json").read_bytes())
    assert os.fsencode(card["sources"][0]["name"]) == b"in/caf\xe9 00.txt"
    assert load_prepared(prepared.directory) == prepared


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    """Also where they lead back."""
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for place in (folder, elsewhere):
        place.mkdir()
    write_lines(folder / "a.jsonl", TEXTS[:40])
    write_lines(elsewhere / "b.jsonl", TEXTS[40:80])
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    assert all_texts(prepare(tmp_path / "out", folder)) == sorted(TEXTS[:80])


def test_json_lines_under_another_name_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "a.txt", TEXTS[:9])
    (tmp_path / "b.txt").write_text("\n".join(TEXTS))
    prepare(tmp_path / "out", tmp_path / "a.txt", tmp_path / "b.txt")
    [line] = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert "a.txt: read as one text, but every line is a JSON object" in line
    made = prepare(tmp_path / "lines", tmp_path / "a.txt", kind="jsonl")
    assert all_texts(made) == sorted(TEXTS[:9])


def test_text_that_holds_what_no_text_holds_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ASCII in UTF-16 is UTF-8 as well, with a NUL after every letter."""
    (tmp_path / "a.txt").write_bytes(" ".join(["letters"] * 99).encode("utf-16-le"))
    (tmp_path / "b.txt").write_text("\n".join(TEXTS))
    prepare(tmp_path / "out", tmp_path / "a.txt", tmp_path / "b.txt")
    [line] = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert "a.txt: holds NUL characters, as UTF-16 and files that were copied in part do" in line


class Telling:
    """Works here and keeps what is told."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def run(self, work: Work, advance: object) -> None:
        tokenize.tokenize_share(work, 0, 1, self.told.append)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_progress_within_a_file_that_is_one_unit(tmp_path: Path, name: str, seed: int) -> None:
    generator = random.Random(seed)
    texts = [generator.randbytes(700).hex() for _ in range(3000)]
    write = {"gz": write_gzip, "zst": write_zstd, "parquet": write_parquet}[name.split(".")[-1]]
    source = write(tmp_path / name, texts)
    here = Telling()
    run.prepare(request(tmp_path / "out", source), executor=here)
    size = source.stat().st_size
    assert sum(here.told) == size
    assert len(here.told) > 2
    assert max(here.told) < 0.7 * size


@pytest.mark.thorough
def test_ten_thousand_small_files(tmp_path: Path) -> None:
    """They share units: no file for each of them."""
    texts = [f"file {number}" for number in range(10_000)]
    for number, text in enumerate(texts):
        path = tmp_path / "in" / f"{number % 100:02d}" / f"{number:04d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    made = prepare(tmp_path / "out", tmp_path / "in")
    assert all_texts(made) == sorted(texts)
    card = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert len(card["sources"]) + card["sources_not_listed"] == 10_000
