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

from hysparse_megatron.data.card import PreparedCorpus, load_prepared
from hysparse_megatron.data.prepare.sources import standard_library
from hysparse_megatron.data.prepare.verify import verify_prepared
from hysparse_megatron.data.read.indexed import open_indexed
from hysparse_megatron.data.sources import open_samples
from hysparse_megatron.data.tokenizer import load_tokenizer
from hysparse_megatron.errors import ConfigError, DataError
from tools.prepare_data import main


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


def test_split_is_by_text_disjoint_and_complete(tmp_path: Path, seed: int) -> None:
    """Copies of a text, in any file, are never on both sides."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write_json_lines(folder / name, 100, seed=seed)
    prepared = prepare(folder, tmp_path / "cache", seed=seed, validation_fraction=0.2)
    lines = (folder / "a.jsonl").read_text().splitlines()
    expected = [json.loads(line)["text"] for line in lines]
    train = texts(prepared, prepared.train_prefix)
    validation = texts(prepared, prepared.validation_prefix)
    assert sorted(train + validation) == sorted(2 * expected)
    assert not set(train) & set(validation)
    assert validation == [text for text in 2 * expected if text in set(validation)]
    found = (prepared.train_documents, prepared.validation_documents)
    assert found == (len(train), len(validation))
    assert load_prepared(prepared.directory, check_hashes=True) == prepared


def test_the_tool_and_a_run_prepare_the_same(tmp_path: Path) -> None:
    """One way from text to tokens: files, split and defaults."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.JSONL", "b.ndjson", "c.json"):
        write_json_lines(folder / name, 100, seed=len(name))
    shutil.copy(write_json_lines(tmp_path / "d.txt", 5), folder / "d.txt")
    by_run = prepare(folder, tmp_path / "cache", validation_fraction=0.2, seed=1234)
    command = ["--tokenizer", by_run.tokenizer_path, "--validation-fraction", "0.2", "--quiet"]
    assert main([*command, "--output", str(tmp_path / "out"), str(folder)]) == 0
    by_tool = load_prepared(str(tmp_path / "out"))
    assert by_tool.fingerprint == by_run.fingerprint
    assert by_tool.train_documents + by_tool.validation_documents == 301


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
    source.touch()  # its content counts, not its time
    other = prepare(source, tmp_path / "other")
    assert Path(other.directory).name == Path(first.directory).name
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
    ]
    write_json_lines(source, 41)
    directories.append(prepare(source, cache).directory)
    assert len(set(directories)) == 5


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
        "from hysparse_megatron.config.schema import DataConfig\n"
        "from hysparse_megatron.data.prepare.cached import prepare_corpus\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "note = lambda line: print('note', line, flush=True)\n"
        "data = DataConfig(path=sys.argv[1], cache_dir=sys.argv[2], tokenizer_vocab_size=300)\n"
        "p = prepare_corpus(data, 7, note)\n"
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
    is_card = name == "dataset.json" and damage == "missing"  # it was never whole
    notes: list[str] = []
    assert prepare(shared_source, tmp_path, progress=notes.append) == first
    assert ("rebuilding damaged" in notes[0]) != is_card
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


@pytest.mark.parametrize("tokenizer", [None, "bytes"])
@pytest.mark.parametrize("border", ["\n\n", "\n", " ", ""])
def test_one_document_is_cut_where_a_part_of_it_ends(
    tmp_path: Path, seed: int, border: str, tokenizer: str | None
) -> None:
    """Whichever split its text would choose, its end is held out."""
    generator = random.Random(seed)
    parts = ["".join(generator.choices("abcdé東", k=generator.randint(1, 9))) for _ in range(400)]
    text = border.join(parts)
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    told: list[str] = []
    arguments = {"seed": seed, "tokenizer_path": tokenizer, "progress": told.append}
    prepared = prepare(tmp_path / "one.txt", tmp_path / "cache", **arguments)
    [train] = texts(prepared, prepared.train_prefix)
    [validation] = texts(prepared, prepared.validation_prefix)
    assert train + validation == text
    assert train.endswith(border) or validation.startswith(border)
    share = prepared.validation_tokens / (prepared.train_tokens + prepared.validation_tokens)
    assert share == pytest.approx(0.25, abs=60 / prepared.train_tokens)
    assert any("the longest is cut after" in line for line in told)
    card = json.loads(Path(prepared.directory, "dataset.json").read_text())
    assert card["cut"] == {"document": 0, "place": prepared.train_tokens - 1}


def test_only_a_corpus_of_too_few_documents_is_cut(tmp_path: Path, seed: int) -> None:
    """The longest of them gives a share of the whole; documents that are split stay whole."""
    lengths = (40, 90, 30)
    folder = tmp_path / "few"
    folder.mkdir()
    for number, words in enumerate(lengths):
        (folder / f"{number}.txt").write_text("word " * words)
    cuts = 0
    for number in range(seed % 1000, seed % 1000 + 12):
        made = prepare(folder, tmp_path / "cache", seed=number, tokenizer_path="bytes")
        card = json.loads(Path(made.directory, "dataset.json").read_text())
        found = texts(made, made.train_prefix), texts(made, made.validation_prefix)
        if card["cut"] is None:
            assert sorted(map(len, found[0] + found[1])) == [150, 200, 450]
            continue
        cuts += 1
        [first, cut, last], [end] = found
        assert (first, cut + end, last) == ("word " * 40, "word " * 90, "word " * 30)
        # A quarter of 160 words and 3 ends are 40 of the 90.
        assert abs(len(cut) - len("word " * 50)) <= len("word ")
    assert cuts
    nothing = prepare(folder, tmp_path / "cache", validation_fraction=0.0)
    assert (nothing.train_documents, nothing.validation_documents) == (3, 0)


def test_copies_of_what_is_cut_are_not_trained_on(tmp_path: Path) -> None:
    """They hold the end that is held out."""
    folder = tmp_path / "books"
    folder.mkdir()
    words = [f"word{number} " for number in range(400)]
    for name in ("book.txt", "copy of book.txt", "third.txt"):
        (folder / name).write_text("".join(words))
    (folder / "short.txt").write_text("a preface")
    found = prepare(folder, tmp_path / "cache", validation_fraction=1e-9, tokenizer_path="bytes")
    [cut, preface] = texts(found, found.train_prefix)
    [end] = texts(found, found.validation_prefix)
    assert (cut + end, preface) == ("".join(words), "a preface")
    card = json.loads(Path(found.directory, "dataset.json").read_text())
    assert card["duplicate_documents"] == 2


def test_too_little_text_to_cut(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(DataError, match=r"one\.txt: none of 1 document.*train\.eval_batches=0"):
        prepare(tmp_path / "one.txt", tmp_path / "cache")
    assert not [f for f in (tmp_path / "cache").iterdir() if (f / "dataset.json").exists()]


def test_nothing_held_out(tmp_path: Path) -> None:
    source = write_json_lines(tmp_path / "corpus.jsonl", 20)
    prepared = prepare(source, tmp_path / "cache", validation_fraction=0.0)
    assert (prepared.train_documents, prepared.validation_documents) == (20, 0)
    assert open_samples(prepared, "train", 8).num_samples > 0
    assert verify_prepared(prepared.directory, lambda line: None) == prepared
    with pytest.raises(DataError, match=r"validation split has 0 tokens.*train\.eval_batches=0"):
        open_samples(prepared, "validation", 8)


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    source = write_json_lines(tmp_path / "corpus.jsonl", 20)
    for fraction in (1.5, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="validation fraction"):
            prepare(source, tmp_path / "cache", validation_fraction=fraction)
    for size in (256, 10**10):
        with pytest.raises(ConfigError, match=rf"of {size} ids: allowed are 257 .* to 16777216"):
            prepare(source, tmp_path / "cache", vocab_size=size)
    with pytest.raises(DataError, match=r"none\.json: cannot read the tokenizer"):
        prepare(source, tmp_path / "cache", tokenizer_path=str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="lies inside the input"):
        prepare(tmp_path, tmp_path / "cache")
    with pytest.raises(ConfigError, match="lies inside the input"):
        prepare(source, source / "cache")


def test_what_progress_raises_is_gone_on_with(tmp_path: Path, shared_source: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("assembling"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(shared_source, tmp_path, progress=stop)
    notes: list[str] = []
    prepare(shared_source, tmp_path, progress=notes.append)
    assert notes[0].startswith("documents end with <|endoftext|> (id 0)")
    assert notes[1].startswith("going on after")
    assert len(list(tmp_path.iterdir())) == 2


def test_standard_library_is_the_default_corpus(tmp_path: Path) -> None:
    sources, description = standard_library()
    names = [source.name for source in sources]
    assert names == sorted(names)
    assert {"abc.py", "asyncio/__init__.py", "json/decoder.py"} <= set(names)
    forbidden = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    assert not [name for name in names if forbidden & set(name.split("/"))]
    assert all(name.endswith(".py") for name in names)
    prepared = prepare(None, tmp_path, tokenizer_path="bytes")
    assert prepared.source == description
    start = time.process_time()
    assert prepare(None, tmp_path, tokenizer_path="bytes") == prepared
    assert time.process_time() - start < 0.3
