"""Token files that hold something else than their card says, in small files and in large ones."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_corpora import prepare

from hysparse_megatron.data import content
from hysparse_megatron.data.card import PreparedCorpus, large_files, load_prepared
from hysparse_megatron.data.content import ContentCheck
from hysparse_megatron.data.sources import BlendedCorpus, check_content
from hysparse_megatron.errors import DataError
from hysparse_megatron.files import sha256_of

DIFFER = r"train\.bin: contents differ"


@pytest.fixture
def small_means_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of some kilobytes are large, and 4 blocks of 16 bytes are read of them."""
    monkeypatch.setattr(content, "SMALL_BYTES", 1000)
    monkeypatch.setattr(content, "NUM_BLOCKS", 4)
    monkeypatch.setattr(content, "BLOCK_BYTES", 16)


def change(path: Path, offset: int) -> None:
    """One bit of a token, to another that the vocabulary has."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def finished(check: ContentCheck) -> ContentCheck:
    check.thread.join(60)
    assert not check.thread.is_alive()
    return check


def test_a_changed_token_of_a_small_file(shared_corpus: PreparedCorpus, tmp_path: Path) -> None:
    folder = shutil.copytree(shared_corpus.directory, tmp_path / "copy")
    assert large_files(str(folder)) == {}
    change(folder / "train.bin", 400)
    with pytest.raises(DataError, match=DIFFER):
        load_prepared(str(folder), check_tokens=False)


def test_a_changed_token_of_a_cached_corpus_is_made_anew(
    shared_source: Path, tmp_path: Path
) -> None:
    prepared = prepare(shared_source, tmp_path)
    tokens = Path(f"{prepared.train_prefix}.bin")
    before = tokens.read_bytes()
    change(tokens, 400)
    told: list[str] = []
    assert prepare(shared_source, tmp_path, progress=told.append) == prepared
    assert tokens.read_bytes() == before
    assert any("rebuilding damaged" in line and "contents differ" in line for line in told)


def test_a_changed_token_of_a_large_file(
    shared_source: Path, tmp_path: Path, small_means_less: None
) -> None:
    """At once in a block, even the last one; else a thread finds it."""
    folder = Path(prepare(shared_source, tmp_path / "cache").directory)
    size = (folder / "train.bin").stat().st_size
    assert size > 1000
    for offset in (0, (size - 16) // 3 + 15, size - 1):
        change(folder / "train.bin", offset)
        with pytest.raises(DataError, match=DIFFER):
            load_prepared(str(folder), check_tokens=False)
        change(folder / "train.bin", offset)
    prepared = load_prepared(str(folder), check_tokens=False)
    told: list[str] = []
    assert finished(check_content([prepared], told.append)).problem is None
    assert told == [
        f"the content of {len(large_files(str(folder)))} large data files is as their cards say"
    ]

    change(folder / "train.bin", 100)
    assert load_prepared(str(folder), check_tokens=False) == prepared
    blend = BlendedCorpus((prepared, prepared), (1.0, 2.0))
    problem = finished(check_content([blend], told.append)).problem
    assert isinstance(problem, DataError)
    assert f"{folder}/train.bin: contents differ" in str(problem)


def test_a_card_without_blocks(shared_source: Path, tmp_path: Path, small_means_less: None) -> None:
    """As earlier versions wrote it: only the thread compares."""
    folder = Path(prepare(shared_source, tmp_path / "cache").directory)
    card: dict[str, Any] = json.loads((folder / "dataset.json").read_text())
    for entry in card["files"].values():
        entry.pop("blocks_sha256", None)
    (folder / "dataset.json").write_text(json.dumps(card))
    change(folder / "train.bin", 0)
    prepared = load_prepared(str(folder), check_tokens=False)
    assert finished(check_content([prepared], lambda line: None)).problem is not None


def test_reading_beside_training_is_slow_and_forgiving(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(bytes(1000))
    told: list[str] = []
    started = time.monotonic()
    hashes = {str(tmp_path / "none"): "", str(path): sha256_of(path)}
    check = finished(ContentCheck(hashes, told.append, bytes_per_second=2000))
    assert time.monotonic() - started >= 0.5
    assert check.problem is None
    assert "none: its content is not checked: No such file" in told[0]
