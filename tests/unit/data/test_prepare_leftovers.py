"""What full disks and kills leave in a work folder, and how a preparation goes on from there."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prepared_corpora import make_texts, prepare, request, write_lines

from hysparse_megatron.data.prepare import run
from hysparse_megatron.data.prepare.executors import LocalProcesses
from hysparse_megatron.data.prepare.shards import Folder, Work
from hysparse_megatron.errors import ConfigError, DataError, HySparseError

HALF = "00000001.shard.0123abcd.tmp"


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """As on a full disk, for this process and those that it starts."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class OnFullDisk:
    """Worker processes that can write only so much into a file."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def run(self, work: Work, advance: Callable[[int], None]) -> None:
        with files_of_at_most(self.num_bytes):
            LocalProcesses(2).run(work, advance)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "a.jsonl", make_texts(300))


@pytest.mark.parametrize("written", [b"x" * 50, b"x" * 150, b"x" * 50_000])
def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, written: bytes) -> None:
    """Whether writing fails, or the write of what is buffered at the end, or once more there."""
    folder = Folder(str(tmp_path))
    folder.write("a", b"before")
    with files_of_at_most(20), pytest.raises(OSError, match="File too large"):
        folder.write("a", written)
    assert folder.names() == {"a"}
    with folder.open("a") as stream:
        assert stream.read() == b"before"


@pytest.mark.parametrize(
    ("room", "message"),
    [(2_000, "shard: cannot write prepared data: File too large"), (100, "the disk is full")],
    ids=["for a note", "for none"],
)
def test_workers_on_a_full_disk_end_with_its_code(
    tmp_path: Path, source: Path, room: int, message: str
) -> None:
    whole = prepare(tmp_path / "whole", source, unit_bytes=50_000)
    asked = request(tmp_path / "out", source, unit_bytes=50_000)
    with pytest.raises(DataError, match=message):
        run.prepare(asked, executor=OnFullDisk(room))
    left = [path.name for path in (tmp_path / "out.work").iterdir()]
    assert not [name for name in left if name.endswith(".tmp")]
    made = run.prepare(asked, executor=LocalProcesses(2))
    assert made is not None
    assert made.fingerprint == whole.fingerprint


def stopped(output: Path, source: Path) -> Path:
    """The work folder of a preparation that was stopped; half a shard is in it, and half a note."""

    class Stopped:
        def run(self, work: Work, advance: Callable[[int], None]) -> None:
            for name in (HALF, "failed-000000.0123abcd.tmp"):
                (Path(work.folder) / name).touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.prepare(request(output, source), executor=Stopped())
    return Path(f"{output}.work")


class Looking:
    """Keeps the names that it finds, and makes nothing."""

    def run(self, work: Work, advance: Callable[[int], None]) -> None:
        self.names = Folder(work.folder).names()
        raise HySparseError("looked")


@pytest.mark.parametrize("has_tasks", [False, True], ids=["here", "by a cluster"])
def test_half_written_files_go_at_the_next_start(
    tmp_path: Path, source: Path, has_tasks: bool
) -> None:
    """But not where tasks of a cluster, which outlive the command, may be writing them."""
    work = stopped(tmp_path / "out", source)
    if has_tasks:
        (work / "logs-20260101-000000").mkdir()
    looking = Looking()
    with pytest.raises(HySparseError, match="looked"):
        run.prepare(request(tmp_path / "out", source), executor=looking)
    assert (HALF in looking.names) == has_tasks
    prepare(tmp_path / "out", source)
    assert not work.exists()


def test_a_kill_at_the_first_file_can_be_gone_on_from(tmp_path: Path, source: Path) -> None:
    work = tmp_path / "out.work"
    work.mkdir()
    (work / "request.json.0123abcd.tmp").touch()
    prepare(tmp_path / "out", source)
    work.mkdir()
    (work / "notes.md").touch()
    with pytest.raises(ConfigError, match="holds other files"):
        prepare(tmp_path / "out", source)
