"""Sources that are no files of this machine: streams, memory, an object store."""

import io
import json
import tracemalloc
import zipfile
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer
from prepared_corpora import make_texts, prepare, request, write_lines

from hysparse_megatron.data.prepare import run, tokenize
from hysparse_megatron.data.prepare.verify import verify_prepared
from hysparse_megatron.errors import DataError

TEXTS = make_texts(300)


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


@pytest.mark.thorough
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
    memory.pipe("/colons/a::b.txt", b"fsspec would open a")
    with pytest.raises(DataError, match=r"holds /colons/a::b[.]txt, which fsspec reads as several"):
        prepare(tmp_path / "colons", "memory://colons")
    copied = prepare(tmp_path / "copied", "memory://in")
    assert copied.fingerprint == wanted.fingerprint


@pytest.mark.parametrize("first", ["", "simplecache::"], ids=["archive", "kept copy of it"])
def test_text_in_an_archive_is_read_through_the_whole_chain(tmp_path: Path, first: str) -> None:
    """A folder in a zip file in another file system: each file in it is a chain of its own."""
    wanted = prepare(tmp_path / "out", write_lines(tmp_path / "a.jsonl", TEXTS))
    with fsspec.open("memory://archives/texts.zip", "wb") as file, zipfile.ZipFile(file, "w") as z:
        z.write(tmp_path / "a.jsonl", "texts/a.jsonl")
        z.writestr("other/b.jsonl", json.dumps({"text": "another folder"}))
    for inside in ("texts", "texts/a.jsonl"):
        url = f"{first}zip://{inside}::memory://archives/texts.zip"
        made = prepare(tmp_path / inside.replace("/", "-"), url)
        assert made.fingerprint == wanted.fingerprint


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
