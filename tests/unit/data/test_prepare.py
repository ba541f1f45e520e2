from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_corpora import prepare, write_json_lines

from hysparse_megatron.data import PreparedCorpus, load_prepared, load_tokenizer, open_corpus
from hysparse_megatron.data.indexed import open_indexed
from hysparse_megatron.data.sources import open_samples
from hysparse_megatron.data.split import Cut, find_cut, is_validation
from hysparse_megatron.errors import DataError


def folder_bytes(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def texts(prepared: PreparedCorpus, prefix: str) -> list[str]:
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    indexed = open_indexed(prefix)
    documents = [np.array(indexed[i]) for i in range(len(indexed))]
    assert all(
        (d == tokenizer.end_of_document).nonzero()[0].tolist() == [len(d) - 1] for d in documents
    )
    return [tokenizer.decode(d[:-1]) for d in documents]


def test_split_is_by_document_disjoint_and_complete(tmp_path: Path, seed: int) -> None:
    source = write_json_lines(tmp_path / "corpus.jsonl", 60, seed=seed)
    prepared = prepare(source, tmp_path / "cache", seed=seed)
    expected = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    train = texts(prepared, prepared.train_prefix)
    validation = texts(prepared, prepared.validation_prefix)
    assert sorted(train + validation) == sorted(expected)
    held_out = [
        is_validation(f"corpus.jsonl:{line}", seed=seed, validation_fraction=0.25)
        for line in range(1, 61)
    ]
    assert validation == [t for t, held in zip(expected, held_out, strict=True) if held]
    assert (prepared.train_documents, prepared.validation_documents) == (
        len(train),
        len(validation),
    )
    assert load_prepared(prepared.directory, check_hashes=True) == prepared


def test_adding_documents_moves_none_between_splits(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_json_lines(tmp_path / name, 30)
    alone = prepare(tmp_path / "a.jsonl", tmp_path / "cache1")
    folder = tmp_path / "both"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        shutil.move(tmp_path / name, folder / name)
    both = prepare(folder, tmp_path / "cache2")
    assert set(texts(alone, alone.validation_prefix)) <= set(texts(both, both.validation_prefix))


def test_cache_hit_is_fast_and_rebuild_is_byte_identical(tmp_path: Path) -> None:
    source = write_json_lines(tmp_path / "corpus.jsonl", 40)
    first = prepare(source, tmp_path / "cache")
    notes: list[str] = []
    start = time.process_time()
    again = prepare(source, tmp_path / "cache", progress=notes.append)
    assert time.process_time() - start < 0.1
    assert again == first
    assert notes == []
    other = prepare(source, tmp_path / "other")
    assert folder_bytes(other.directory) == folder_bytes(first.directory)
    assert other.fingerprint == first.fingerprint


def test_key_changes_with_all_that_matters(tmp_path: Path) -> None:
    source = write_json_lines(tmp_path / "corpus.jsonl", 40)
    cache = tmp_path / "cache"
    directories = [
        prepare(source, cache).directory,
        prepare(source, cache, seed=8).directory,
        prepare(source, cache, vocab_size=301).directory,
        prepare(source, cache, validation_fraction=0.3).directory,
        prepare(source, cache, max_bytes=10_000).directory,
    ]
    write_json_lines(source, 41)
    directories.append(prepare(source, cache).directory)
    assert len(set(directories)) == 6


def test_given_tokenizer_is_used_and_its_content_counts(tmp_path: Path) -> None:
    source = write_json_lines(tmp_path / "corpus.jsonl", 40)
    own = prepare(source, tmp_path / "cache", vocab_size=350)
    tokenizer = tmp_path / "given" / "tokenizer.json"
    tokenizer.parent.mkdir()
    shutil.copy(own.tokenizer_path, tokenizer)
    given = prepare(source, tmp_path / "cache", tokenizer_path=str(tokenizer), vocab_size=4096)
    assert given.directory != own.directory
    assert given.fingerprint == own.fingerprint
    assert 300 < given.vocab_size == own.vocab_size <= 350
    assert given == prepare(source, tmp_path / "cache", tokenizer_path=str(tokenizer.parent))
    other = prepare(source, tmp_path / "cache", vocab_size=300)
    shutil.copy(other.tokenizer_path, tokenizer)
    changed = prepare(source, tmp_path / "cache", tokenizer_path=str(tokenizer))
    assert changed.directory != given.directory
    assert changed.fingerprint != given.fingerprint


def test_prepared_folder_as_path_is_used_as_it_is(tmp_path: Path) -> None:
    source = write_json_lines(tmp_path / "corpus.jsonl", 40)
    first = prepare(source, tmp_path / "cache")
    moved = tmp_path / "moved"
    shutil.move(first.directory, moved)
    again = prepare(moved, tmp_path / "unused")
    assert again.fingerprint == first.fingerprint
    assert again.directory == str(moved)
    assert not (tmp_path / "unused").exists()
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    with pytest.raises(DataError, match="is not the tokenizer that"):
        prepare(moved, tmp_path / "unused", tokenizer_path=str(tokenizer))


@pytest.mark.thorough
def test_concurrent_callers_build_once_and_agree(tmp_path: Path) -> None:
    source = write_json_lines(tmp_path / "corpus.jsonl", 400)
    code = (
        "import sys, time\n"
        "from hysparse_megatron.data import prepare_corpus\n"
        "import megatron.core.datasets.indexed_dataset\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "note = lambda line: print('note', line, flush=True)\n"
        "p = prepare_corpus(path=sys.argv[1], cache_dir=sys.argv[2], tokenizer_path=None,\n"
        "    vocab_size=300, validation_fraction=0.25, seed=7, progress=note)\n"
        "print('result', p, flush=True)\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, str(source), str(tmp_path / "cache")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        outputs = [child.communicate(timeout=60)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    results = [line for output in outputs for line in output.splitlines() if "result" in line]
    assert len(results) == 2
    assert results[0] == results[1]
    assert sum("note tokenizing" in output for output in outputs) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the folder and its lock


@pytest.mark.parametrize(
    "name", ["train.bin", "train.idx", "validation.bin", "tokenizer.json", "dataset.json"]
)
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damaged_cache_is_refused_on_load_and_rebuilt(
    tmp_path: Path, shared_source: Path, name: str, damage: str
) -> None:
    first = prepare(shared_source, tmp_path)
    whole = folder_bytes(first.directory)
    path = Path(first.directory) / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[name][:-2])
        if name == "dataset.json":
            path.write_bytes(whole[name][:-20])
    with pytest.raises(DataError, match=name.split(".")[0]) as caught:
        load_prepared(first.directory)
    assert str(path) in str(caught.value)
    notes: list[str] = []
    assert prepare(shared_source, tmp_path, progress=notes.append) == first
    assert "rebuilding damaged" in notes[0]
    assert folder_bytes(first.directory) == whole


def test_bin_shorter_than_its_index_names_the_offset(tmp_path: Path, shared_source: Path) -> None:
    prepared = prepare(shared_source, tmp_path)
    path = Path(f"{prepared.train_prefix}.bin")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"train\.bin: ends at offset 100, its index announces"):
        load_prepared(prepared.directory)


def test_changed_token_is_refused_by_offset_and_changed_content_by_hash(
    tmp_path: Path, shared_source: Path
) -> None:
    prepared = prepare(shared_source, tmp_path)
    path = Path(f"{prepared.validation_prefix}.bin")
    content = bytearray(path.read_bytes())
    content[20:22] = b"\xff\xff"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"validation\.bin: token id 65535 at offset 20"):
        load_prepared(prepared.directory)
    content[20:22] = b"\x01\x00"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"validation\.bin: contents differ"):
        load_prepared(prepared.directory, check_hashes=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 99, "format 99, expected 1"),
        ("train_tokens", "many", "'train_tokens' is 'many', expected an integer"),
        ("train_tokens", 5, "announces"),
        ("fingerprint", "0" * 64, "fingerprint does not belong"),
        ("files", {}, "no size and hash for train.bin"),
    ],
)
def test_garbage_card_is_refused(
    tmp_path: Path, shared_source: Path, key: str, value: object, message: str
) -> None:
    prepared = prepare(shared_source, tmp_path)
    path = Path(prepared.directory) / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(DataError, match=message):
        load_prepared(prepared.directory)
    path.write_text("[]")
    with pytest.raises(DataError, match=r"dataset\.json: not a dataset card"):
        load_prepared(prepared.directory)


@pytest.mark.parametrize("border", ["\n\n", "\n", " ", ""])
def test_one_document_is_cut_where_a_part_of_it_ends(
    tmp_path: Path, seed: int, border: str
) -> None:
    """Whichever split its name would choose, the end of the text is held out."""
    generator = random.Random(seed)
    parts = ["".join(generator.choices("abcdé東", k=generator.randint(1, 9))) for _ in range(400)]
    text = border.join(parts)
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    told: list[str] = []
    prepared = prepare(tmp_path / "one.txt", tmp_path / "cache", seed=seed, progress=told.append)
    [train] = texts(prepared, prepared.train_prefix)
    [validation] = texts(prepared, prepared.validation_prefix)
    assert train + validation == text
    assert train.endswith(border)
    assert len(validation) / len(text) == pytest.approx(0.25, abs=12 / len(text))
    assert any("one.txt is cut at character" in line for line in told)
    card = json.loads(Path(prepared.directory, "dataset.json").read_text())
    assert card["cut"] == {"name": "one.txt", "place": len(train)}


def test_only_a_corpus_of_too_few_documents_is_cut(tmp_path: Path, seed: int) -> None:
    """The longest of them gives a share of the whole; documents that are split stay whole."""
    folder = tmp_path / "few"
    folder.mkdir()
    for number, words in enumerate((40, 90, 30)):
        (folder / f"{number}.txt").write_text("word " * words)
    seeds = range(seed % 1000, seed % 1000 + 100)
    few = open_corpus(str(folder))
    names = [file.name for file in few.files]
    for seed in seeds:
        split = {is_validation(name, seed=seed, validation_fraction=0.25) for name in names}
        cut = find_cut(few, seed=seed, validation_fraction=0.25)
        assert (cut is None) == (len(split) == 2)
        # A quarter of 160 words are 40 of the 90.
        assert cut in (None, Cut("1.txt", 50 * len("word ")))
    assert find_cut(few, seed=0, validation_fraction=0.0) is None


def test_too_little_text_to_cut(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(DataError, match=r"one\.txt: none of 1 document.*train\.eval_batches=0"):
        prepare(tmp_path / "one.txt", tmp_path / "cache")
    leftovers = [f.name for f in (tmp_path / "cache").iterdir() if not f.name.endswith(".lock")]
    assert leftovers == []


def test_nothing_held_out(tmp_path: Path) -> None:
    source = write_json_lines(tmp_path / "corpus.jsonl", 20)
    prepared = prepare(source, tmp_path / "cache", validation_fraction=0.0)
    assert (prepared.train_documents, prepared.validation_documents) == (20, 0)
    assert load_prepared(prepared.directory, check_hashes=True) == prepared
    assert open_samples(prepared, "train", 8).num_samples > 0
    with pytest.raises(DataError, match=r"validation split has 0 tokens.*train\.eval_batches=0"):
        open_samples(prepared, "validation", 8)


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    source = write_json_lines(tmp_path / "corpus.jsonl", 20)
    for fraction in (1.0, -1.0, float("nan")):
        with pytest.raises(DataError, match="validation_fraction"):
            prepare(source, tmp_path / "cache", validation_fraction=fraction)
    with pytest.raises(DataError, match="vocab_size 256"):
        prepare(source, tmp_path / "cache", vocab_size=256)
    with pytest.raises(DataError, match=r"none\.json: cannot read the tokenizer"):
        prepare(source, tmp_path / "cache", tokenizer_path=str(tmp_path / "none.json"))
    with pytest.raises(DataError, match="cache lies inside the corpus"):
        prepare(tmp_path, tmp_path / "cache")
    with pytest.raises(DataError, match=r"corpus\.jsonl.*cannot write prepared data"):
        prepare(source, source / "cache")


def test_bad_line_stops_the_preparation_or_is_counted(tmp_path: Path) -> None:
    source = write_json_lines(tmp_path / "corpus.jsonl", 40)
    with source.open("a") as stream:
        stream.write('{"other": 1}\n\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl:41: missing field 'text'"):
        prepare(source, tmp_path / "cache")
    prepared = prepare(source, tmp_path / "cache", max_bad_documents=1)
    assert (prepared.bad_documents, prepared.empty_documents) == (1, 1)


def test_what_progress_raises_leaves_nothing_behind(tmp_path: Path, shared_source: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("tokenizing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(shared_source, tmp_path, progress=stop)
    assert [file.suffix for file in tmp_path.iterdir()] == [".lock"]


def test_leftovers_of_a_killed_builder_are_removed(tmp_path: Path, shared_source: Path) -> None:
    directory = prepare(shared_source, tmp_path).directory
    Path(f"{directory}.tmp-dead").mkdir()
    shutil.rmtree(directory)
    prepare(shared_source, tmp_path)
    assert not Path(f"{directory}.tmp-dead").exists()


def test_standard_library_is_the_default_corpus(tmp_path: Path) -> None:
    prepared = prepare(None, tmp_path, max_bytes=400_000, vocab_size=512)
    assert "standard library" in prepared.source
    assert prepared.vocab_size == 512
    start = time.process_time()
    assert prepare(None, tmp_path, max_bytes=400_000, vocab_size=512) == prepared
    assert time.process_time() - start < 0.1
