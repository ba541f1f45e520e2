import errno
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from hysparse_megatron.data.read.dataset import TokenSamples
from hysparse_megatron.data.read.indexed import (
    TokenFile,
    check_indexed,
    check_token_ids,
    open_indexed,
)
from hysparse_megatron.errors import DataError
from tests.token_files import write_indexed

DOCUMENTS = [[5, 1, 2, 0], [0], [7, 8, 0]]


def write(folder: Path, documents: list[list[int]], vocab_size: int = 10) -> str:
    return write_indexed(str(folder / "data"), documents, vocab_size)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(10, np.uint16), (100_000, np.int32)])
def test_megatron_reads_what_was_written(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    prefix = write(tmp_path, [*DOCUMENTS, [vocab_size - 1]], vocab_size)
    dataset = IndexedDataset(prefix, mmap=True)
    assert [dataset[i].tolist() for i in range(len(dataset))] == [*DOCUMENTS, [vocab_size - 1]]
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    summary = check_indexed(prefix)
    assert (summary.dtype, summary.num_documents, summary.num_tokens) == (dtype, 4, 9)
    check_token_ids(prefix, vocab_size)
    assert len(open_indexed(prefix)) == 4


def test_token_outside_the_vocabulary_names_file_and_offset(tmp_path: Path) -> None:
    prefix = write(tmp_path, DOCUMENTS)
    with pytest.raises(DataError, match=r"data\.bin: token id 8 at offset 12 is outside .* of 8"):
        check_token_ids(prefix, 8)
    signed = write(tmp_path, [[1, -3]], vocab_size=100_000)
    with pytest.raises(DataError, match="token id -3 at offset 4"):
        check_token_ids(signed, 100_000)


def test_bin_shorter_than_idx_names_the_offset(tmp_path: Path) -> None:
    prefix = write(tmp_path, DOCUMENTS)
    token_file = Path(f"{prefix}.bin")
    whole = token_file.read_bytes()
    token_file.write_bytes(whole[:9])
    with pytest.raises(DataError, match=r"data\.bin: ends at offset 9, .* 16 bytes; document 1"):
        open_indexed(prefix)
    token_file.write_bytes(whole + b"\0\0")
    with pytest.raises(DataError, match="from offset 16 belong to no document"):
        open_indexed(prefix)


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"NOTANIDX", "not a Megatron index (bad header at offset 0)"),
        (9, struct.pack("<Q", 7), "index version 7 at offset 9"),
        (17, b"\x00", "token type code 0 at offset 17"),
        (18, struct.pack("<Q", 50), "ends at offset 102, its header announces"),
        (18, struct.pack("<Q", 0), "holds no document"),
        (34 + 12 + 8, struct.pack("<Q", 3), "document 1 does not start"),
        (34 + 36 + 24, struct.pack("<Q", 9), "bad document borders (offset 70)"),
    ],
)
def test_damaged_index_is_refused(
    tmp_path: Path, offset: int, content: bytes, message: str
) -> None:
    prefix = write(tmp_path, DOCUMENTS)
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    index[offset : offset + len(content)] = content
    Path(f"{prefix}.idx").write_bytes(index)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        check_indexed(prefix)
    assert f"{prefix}.idx" in str(caught.value)


def test_missing_cut_or_empty_files_are_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path, [[]])
    with pytest.raises(DataError, match="holds no tokens"):
        open_indexed(prefix)
    Path(f"{prefix}.idx").write_bytes(b"MMID")
    with pytest.raises(DataError, match="header cut off at offset 4"):
        check_indexed(prefix)
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(DataError, match=r"data\.bin: cannot be read"):
        check_indexed(prefix)


def test_files_cut_short_while_they_are_in_use(tmp_path: Path) -> None:
    """A memory map would end the process by SIGBUS. What is still there can be read."""
    page = 4096
    documents = [[number % 9 for number in range(page)] for _ in range(6)]
    prefix = write(tmp_path, documents)
    samples = TokenSamples(prefix, seq_length=page, vocab_size=10)
    assert samples[4].tolist() == [*documents[4], 0]
    assert samples.document_starts(4).tolist() == [0, page]
    os.truncate(f"{prefix}.bin", 2 * page + 2)
    assert samples[0].tolist() == [*documents[0], 0]
    with pytest.raises(DataError, match=rf"data\.bin: ends before offset {4 * page + 2}: .* cut"):
        samples[1]
    with pytest.raises(DataError, match=r"data\.bin: ends before offset"):
        samples[4]
    os.truncate(f"{prefix}.idx", 34)
    with pytest.raises(DataError, match=r"data\.idx: ends at offset 34, but had 162 bytes"):
        samples.document_starts(4)


def test_a_file_that_cannot_be_read_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = TokenFile(write(tmp_path, DOCUMENTS))

    def fail(*_: int) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DataError, match=r"data\.bin: cannot be read at offset 2: Stale"):
        tokens.read(np.uint16, 1, 2)
