"""Every kind of input gives the same documents, wherever it is cut."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from backports import zstd
from moto.server import ThreadedMotoServer
from prepared_corpora import (
    all_texts,
    byte_texts,
    contents,
    documents,
    make_texts,
    prepare,
    request,
    save_tokenizer,
    write_lines,
)

from hysparse_megatron import packages
from hysparse_megatron.data.prepare import run, tokenize
from hysparse_megatron.data.prepare.assemble import held_out
from hysparse_megatron.data.prepare.shards import Work
from hysparse_megatron.data.prepare.sources import list_sources
from hysparse_megatron.data.prepare.verify import verify_prepared
from hysparse_megatron.data.tokenizer import load_tokenizer
from hysparse_megatron.errors import ConfigError, DataError
from tests.token_files import write_indexed

TEXTS = make_texts(300)


def write_arrow(folder: Path, texts: list[str]) -> Path:
    """As `datasets.save_to_disk` lays it out, in two files whose names do not sort."""
    folder.mkdir()
    names = ["data-b.arrow", "data-a.arrow"]
    for name, half in zip(names, (texts[:120], texts[120:]), strict=True):
        table = pa.table({"id": list(range(len(half))), "text": half})
        with (
            pa.OSFile(str(folder / name), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=17)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names]})
    )
    return folder


def write_parquet(
    path: Path,
    texts: list[str | None],
    row_group_size: int = 40,
    kind: pa.DataType = pa.string(),  # noqa: B008
) -> Path:
    column = pa.array(texts, pa.string())
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
    table = pa.table({"text": column, "other": ["x"] * len(texts)})
    pa.parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def write_gzip(path: Path, texts: list[str]) -> Path:
    """Two members, as `cat a.gz b.gz` makes."""
    plain = write_lines(path.parent / "plain", texts).read_bytes()
    path.write_bytes(gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]))
    return path


def write_zstd(path: Path, texts: list[str]) -> Path:
    """Two frames."""
    plain = write_lines(path.parent / "plain", texts).read_bytes()
    path.write_bytes(zstd.compress(plain[:5000]) + zstd.compress(plain[5000:]))
    return path


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


def test_listing(tmp_path: Path) -> None:
    saved = write_arrow(tmp_path / "saved", TEXTS)
    assert [source.name for source in list_sources([str(tmp_path)])] == [
        f"{tmp_path.name}/saved/data-b.arrow",
        f"{tmp_path.name}/saved/data-a.arrow",
    ]
    with pytest.raises(ConfigError, match=r"data-b\.arrow: is given twice"):
        list_sources([str(saved), str(saved / "data-b.arrow")])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"holds the splits train, test; give those .*/train"):
        list_sources([str(tmp_path)])
    (saved / "data-a.arrow").unlink()
    with pytest.raises(DataError, match=r"data-a\.arrow: missing"):
        list_sources([str(saved)])
    with pytest.raises(DataError, match="No such file"):
        list_sources([str(tmp_path / "nowhere")])


def test_a_missing_package_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(packages.importlib, "import_module", refuse)
    for name, package in (("a.parquet", "pyarrow"), ("a.jsonl.zst", "backports.zstd")):
        (tmp_path / name).touch()
        with pytest.raises(ConfigError, match=rf"pip install {package} \(the extra `data`"):
            list_sources([str(tmp_path / name)])


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


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "pipe.txt")
    for given in ("pipe.jsonl", "folder"):
        with pytest.raises(DataError, match=r"pipe\.\w+: is a pipe, a socket or a device"):
            list_sources([str(tmp_path / given)])
    (tmp_path / "folder" / "pipe.txt").unlink()
    (tmp_path / "folder" / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="dangling: cannot be read: No such file"):
        list_sources([str(tmp_path / "folder")])


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


class Stream(io.RawIOBase):
    """JSON lines that are made as they are read."""

    line = json.dumps({"text": "a line of a stream that nobody stores " * 25}).encode() + b"\n"

    def __init__(self, size: int) -> None:
        self.size, self.place = size // len(self.line) * len(self.line), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = 0) -> int:
        self.place = place
        return place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = min(len(buffer), self.size - self.place)
        first = self.place % len(self.line)
        data = self.line * (2 + count // len(self.line))
        buffer[:count] = data[first : first + count]
        self.place += count
        return count


class Streams(fsspec.AbstractFileSystem):
    """stream://SIZE.jsonl"""

    protocol = "stream"

    def info(self, path: str, **options: object) -> dict:
        size = int(self._strip_protocol(path).partition(".")[0])
        return {"name": path, "size": Stream(size).size, "type": "file"}

    def find(self, path: str, **options: object) -> dict:
        return {}

    def _open(self, path: str, mode: str = "rb", **options: object) -> Stream:
        return Stream(int(self._strip_protocol(path).partition(".")[0]))


def test_a_stream_that_is_never_stored(tmp_path: Path) -> None:
    """The shape of a corpus of any size, `stream://20000000000.jsonl`: many units of one file,
    whose memory does not grow with it."""
    fsspec.register_implementation("stream", Streams, clobber=True)
    peaks = []
    for size in (5_000_000, 20_000_000):
        tracemalloc.start()
        options = {"unit_bytes": 1 << 20, "validation_fraction": 0.0}
        made = prepare(tmp_path / str(size), f"stream://{size}.jsonl", **options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert made.train_documents == size // len(Stream.line)
    assert peaks[1] < 1.3 * peaks[0], peaks


def test_memory_of_another_file_system_is_read_and_written(tmp_path: Path) -> None:
    here = write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.txt").write_text("text " * 100)
    wanted = prepare(tmp_path / "out", here, tmp_path / "b.txt")
    memory = fsspec.filesystem("memory")
    for name in ("a.jsonl", "b.txt"):
        memory.pipe(f"/in/{name}", (tmp_path / name).read_bytes())
    assert run.prepare(request("memory://made", "memory://in/a.jsonl", "memory://in/b.txt")) is None
    compare_remote(memory, "/made", wanted.directory)
    copied = prepare(tmp_path / "copied", "memory://in")
    assert copied.fingerprint == wanted.fingerprint


def compare_remote(fs: fsspec.AbstractFileSystem, made: str, wanted: str) -> None:
    """Assert that a folder elsewhere, copied here, is the one that was prepared here."""
    copy = Path(wanted).parent / "copy"
    fs.get(f"{made}/", f"{copy}/", recursive=True)
    for name in ("train.bin", "train.idx", "validation.bin", "validation.idx", "tokenizer.json"):
        assert (copy / name).read_bytes() == Path(wanted, name).read_bytes(), name
    verify_prepared(str(copy), lambda line: None)
    assert not fs.exists(f"{made}.work")


@pytest.mark.thorough
def test_s3_is_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that speaks its language, on this machine; what was begun goes on there too."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        _, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        s3 = fsspec.filesystem("s3", skip_instance_cache=True)
        s3.mkdir("bucket")
        here = write_lines(tmp_path / "a.jsonl", TEXTS)
        s3.put(str(here), "bucket/in/a.jsonl")
        wanted = prepare(tmp_path / "out", here)
        asked = request("s3://bucket/made", "s3://bucket/in")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "assemble", lambda *a: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run.prepare(asked)
        assert s3.exists("bucket/made.work/00000003.shard")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokenize, "_tokenize_unit", None)  # nothing is done again
            run.prepare(asked)
        compare_remote(s3, "bucket/made", wanted.directory)
    finally:
        server.stop()
