"""Faults 5 and 22: data that changed under a run, and data that cannot be read."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hysparse_megatron.config.compose import compose
from hysparse_megatron.data.card import PreparedCorpus
from hysparse_megatron.data.read.dataset import TokenSamples
from hysparse_megatron.data.sources import load_data
from hysparse_megatron.data.tokenizer import train_tokenizer
from tests.fault.faulty_runs import STEPS, FaultyRun, short
from tests.run.run_commands import contents, processes_naming, read_json, rows, run, write_text

NewRun = Callable[..., FaultyRun]

PREPARE = ("-m", "tools.prepare_data")
HUGE_MB = 1


def test_changed_data_under_a_resume(straight: FaultyRun, new_run: NewRun, tmp_path: Path) -> None:
    run = new_run()
    run.take_over(straight, 8)
    before = contents(run.run_dir / "checkpoints")
    config = (run.run_dir / "config.yaml").read_text()
    other = write_text(tmp_path / "other", seed=-1)
    output = run.run(f"data.path={other}", code=5)
    old = read_json(run.checkpoint(8) / "manifest.json")["data"]
    assert f"the data changed since {run.checkpoint(8)} was written: " in output
    for field in ("fingerprint", "source", "train_tokens"):
        assert f"{field}: {old[field]} -> " in output
    assert "vocab_size" not in output, "what is as it was is not told"
    assert f"checkpoint.load={run.run_dir}" in output
    run.assert_ended("failed", 5, None, "the data changed since")
    assert contents(run.run_dir / "checkpoints") == before
    assert (run.run_dir / "config.yaml").read_text() == config, "of the data it was trained on"

    output = run.run(f"data.path={other}", "checkpoint.accept_changed_data=true", code=0)
    assert "WARNING: the data changed since" in output
    assert "resuming after step 8" in output
    new = read_json(run.checkpoint(STEPS) / "manifest.json")["data"]
    assert new["source"] == str(other)
    assert f"fingerprint: {old['fingerprint']} -> {new['fingerprint']}" in output


def write_bad_text(folder: Path) -> Path:
    """Forty good documents, two empty ones, and five of which each is bad in another way."""
    write_text(folder, seed=3)
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    lines = [
        json.dumps({"text": "good " * 50}).encode(),
        b"",
        b'{"body": "x"}',
        b'{"text": "\xff"}',
        json.dumps({"text": "a" * (HUGE_MB << 20)}).encode(),
        b"no JSON",
    ]
    (folder / "lines.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def prepare(source: Path, output: Path, *options: str, code: int = 0) -> str:
    """Prepare with two workers, of whom none is left."""
    command = ["--tokenizer", "bytes", "--workers", "2", f"--max-document-mb={HUGE_MB}"]
    command += ["--validation-fraction=0.2", f"--output={output}", *options, str(source)]
    told = run(command, entry=PREPARE, code=code)
    assert processes_naming(f"--output={output}") == []
    return told


def test_preparation_counts_and_reports_and_stops_over_a_limit(tmp_path: Path) -> None:
    source = write_bad_text(tmp_path / "text")
    lines = source / "lines.jsonl"
    start = lines.read_bytes().index
    told = [
        f"{source}/latin.txt: bad UTF-8 (byte 0xe9) at offset 3",
        f"{lines}:3: missing field 'text', line at offset {start(b'{"body')}; fields found: body",
        f"{lines}:4: bad UTF-8 (byte 0xff) at offset {start(b'\xff')}",
        f"{lines}:5: longer than 1,048,576 bytes, line at offset {start(b'{"text": "a')}",
        f"{lines}:6: not a JSON object, line at offset {start(b'no JSON')}",
    ]
    output = prepare(source, tmp_path / "out", "--max-bad=4", code=5)
    assert "5 bad document(s) so far, 4 allowed" in output
    assert all(line in output for line in told), output
    assert not (tmp_path / "out").exists()

    output = prepare(source, tmp_path / "out", "--max-bad=5")
    assert "41 documents (2 empty and 5 bad left out)" in output
    card = read_json(tmp_path / "out" / "dataset.json")
    assert (card["empty_documents"], card["bad_documents"]) == (2, 5)
    assert [
        sample for sample, line in zip(card["bad_samples"], told, strict=True) if line in sample
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder. Tests must not change it."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare(write_text(folder / "text", seed=4), folder / "out")
    return folder / "out"


def cut(folder: Path) -> str:
    tokens = folder / "train.bin"
    tokens.write_bytes(tokens.read_bytes()[:1001])
    return f"{tokens}: ends at offset 1001, its index announces "


def change_a_token(folder: Path) -> str:
    """To another of the vocabulary."""
    put_token(folder / "train.bin", 70, 1)
    return f"{folder}/train.bin: contents differ from the hash in its dataset.json"


def put_token(path: Path, place: int, token: int = 65535) -> None:
    tokens = np.memmap(path, np.uint16, mode="r+")
    assert tokens[place] != token
    tokens[place] = token
    tokens.flush()


@pytest.mark.parametrize("damage", [cut, change_a_token])
def test_a_damaged_folder_is_refused_by_file_and_offset(
    damage: Callable[[Path], str], prepared: Path, new_run: NewRun, tmp_path: Path
) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    expected = damage(tmp_path / "copy")
    run = new_run()
    output = run.run(f"data.path={tmp_path}/copy", code=5)
    assert f"DataError: {expected}" in output
    run.assert_ended("failed", 5, None, re.escape(expected))


def test_another_tokenizer_than_that_of_the_folder(
    prepared: Path, new_run: NewRun, tmp_path: Path
) -> None:
    other = tmp_path / "tokenizer.json"
    train_tokenizer(["some other text"], 300).save(str(other))
    run = new_run()
    output = run.run(f"data.path={prepared}", f"data.tokenizer={other}", code=5)
    expected = f"{other}: is not the tokenizer that {prepared} was prepared with"
    assert f"DataError: {expected}" in output
    run.assert_ended("failed", 5, None, re.escape(expected))


@pytest.mark.parametrize("name", ["latin.txt", "lines.jsonl"])
def test_bad_text_is_refused_by_file_and_offset(name: str, new_run: NewRun, tmp_path: Path) -> None:
    source = write_bad_text(tmp_path / "text")
    (source / ({"latin.txt", "lines.jsonl"} - {name}).pop()).unlink()
    run = new_run()
    output = run.run(f"data.path={source}", f"data.cache_dir={tmp_path}/cache", code=5)
    offset = {"latin.txt": 3, "lines.jsonl": (source / name).read_bytes().find(b'{"body')}[name]
    expected = rf"1 bad .*, 0 allowed; .*\n  {re.escape(str(source / name))}.* at offset {offset}\b"
    assert re.search(f"DataError: {expected}", output), output
    run.assert_ended("failed", 5, None, expected)


def test_a_token_that_one_rank_alone_reads(new_run: NewRun, tmp_path: Path) -> None:
    """In the middle of training: a file that changes meanwhile is looked at when it is read."""
    run, cache = new_run(), f"data.cache_dir={tmp_path}/cache"
    config = compose([*run.settings, cache])
    corpus = load_data(config.data)
    assert isinstance(corpus, PreparedCorpus)
    samples = TokenSamples(corpus.train_prefix, config.train.seq_length)
    # The last of step 4, which is read when step 3 begins, behind the slow one; in the second half
    # of its batch, which is rank 1's.
    position = 4 * config.train.global_batch_size - 1
    [sample] = samples.sample_ids(
        np.array([position]), seed=config.train.seed, fingerprint=corpus.fingerprint
    )
    place = int(sample) * samples.seq_length + samples.seq_length // 2
    command = run.start(cache, fault="slow@0:2:5")
    command.wait_for(f"step  1/{STEPS}")
    put_token(Path(f"{corpus.train_prefix}.bin"), place)
    assert command.finish() == 5, command.output
    output = command.output
    assert f"step  2/{STEPS}" in output
    tokens = re.escape(f"{corpus.train_prefix}.bin")
    expected = rf"rank 1 on .* failed: {tokens}: token id 65535 at offset {2 * place} "
    assert re.search(f"RankFailure: {expected}", output), output
    run.assert_ended("failed", 5, 1, expected)


def test_empty_and_huge_documents_are_no_fault(new_run: NewRun, tmp_path: Path) -> None:
    source = write_text(tmp_path / "text", seed=5)
    (source / "empty.txt").touch()
    (source / "huge.txt").write_text("a line of a huge document\n" * 50_000)
    line = json.dumps({"text": "good " * 50})
    (source / "lines.jsonl").write_text(f"{line}\n\n{line}\n")
    overrides = [f"data.path={source}", f"data.cache_dir={tmp_path}/cache"]
    output = new_run().run(*overrides, *short(2), code=0)
    assert "in 43 documents (2 empty and 0 bad left out)" in output


def test_batches_are_read_beside_the_step_before(new_run: NewRun) -> None:
    """Step 5 waits for nothing; the read of step 9, which has no end, holds no stop up."""
    run = new_run()
    forward, read = "slow@0:4:forward/2.5", "slow@0:5:read/2"
    run.run(code=3, fault=f"{forward},{read},sigterm@1:8,slow@0:9:read/1000")
    run.assert_ended("preempted", 3, 1, "SIGTERM on rank 1 after step 8; saved at step 8")
    assert run.row(4)["step_seconds"] > 2.5
    assert run.row(5)["data_seconds"] < 1


def test_a_read_that_fails_ends_the_run_at_its_step(new_run: NewRun) -> None:
    run = new_run()
    output = run.run(code=1, fault="io_error@1:3:read")
    assert "a fault was asked for at step 3" in output
    run.assert_ended("failed", 1, 1, "a fault was asked for at step 3")
    assert run.row(2)
    assert not [row for row in rows(run.run_dir) if row["step"] == 3]
