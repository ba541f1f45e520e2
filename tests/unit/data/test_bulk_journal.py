"""What the work folder remembers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hysparse_megatron.data.bulk.journal import WorkFolder
from hysparse_megatron.data.bulk.shards import ShardRecord, TextPart


def opened(path: Path) -> WorkFolder:
    return WorkFolder(str(path), {"a": 1}, np.uint16, discard=False)


def add(folder: WorkFolder, number: int, part: TextPart | None = None) -> ShardRecord:
    record = ShardRecord(f"{number:08d}-000000", 3, 0, 0, 0, 0, 9, "", part=part)
    Path(folder.shard_path(record)).write_bytes(bytes(6))
    folder.add(record)
    return record


@pytest.mark.parametrize("torn", [b"", b"{", b'{"name": "00', b"\x00\xff\n"])
def test_a_torn_line_costs_no_other(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "out.work"
    first = opened(path)
    records = [add(first, 2, TextPart(2, "ab", True, False)), add(first, 0)]
    first.close()
    with (path / "journal.jsonl").open("ab") as stream:
        stream.write(torn)
    second = opened(path)
    assert list(second.records.values()) == records
    records.append(add(second, 1))
    second.close()
    third = opened(path)
    assert list(third.records.values()) == records
    assert third.in_order() == [records[1], records[2], records[0]]
    third.close()


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "out.work"
    folder = opened(path)
    record = add(folder, 0)
    folder.close()
    for name in ("00000001-000000.tmp-77", "00000002-000000.spill"):
        (path / name).write_bytes(b"half")
    (path / "output").mkdir()
    (path / "output" / "train.bin").touch()
    folder = opened(path)
    assert list(folder.records) == [record.name]
    assert {file.name for file in path.iterdir()} == {record.name, "journal.jsonl", "request.json"}
    folder.remove()
    assert not path.exists()
