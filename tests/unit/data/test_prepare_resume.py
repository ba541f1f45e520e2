"""Kills, several workers, faults of the disk, and what an output folder may be."""

import fcntl
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from prepared_corpora import (
    UNIT_BYTES,
    contents,
    make_texts,
    prepare,
    request,
    save_sentencepiece,
    save_tokenizer,
    write_gzip,
    write_lines,
    write_parquet,
)

from hysparse_megatron.data.prepare import run
from hysparse_megatron.data.prepare.executors import Executor, LocalProcesses
from hysparse_megatron.data.prepare.request import PrepareRequest
from hysparse_megatron.data.prepare.shards import Work
from hysparse_megatron.data.prepare.tokenize import tokenize_share
from hysparse_megatron.data.prepare.verify import verify_prepared
from hysparse_megatron.errors import ConfigError, DataError

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import sys
from hysparse_megatron.data.prepare.executors import LocalProcesses
from hysparse_megatron.data.prepare.request import PrepareRequest, sources_of
from hysparse_megatron.data.prepare.run import prepare
from hysparse_megatron.data.tokenizer_choice import choose_tokenizer
from hysparse_megatron.errors import HySparseError

tokenizer, output, *inputs = sys.argv[1:]
sources, description = sources_of(inputs, output)
request = PrepareRequest(
    sources, output, choose_tokenizer(tokenizer), description=description,
    validation_fraction=0.2, deduplicate=True, unit_bytes=UNIT_BYTES)
try:
    prepare(request, executor=LocalProcesses(2))
except HySparseError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
""".replace("UNIT_BYTES", str(UNIT_BYTES))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all kinds of files, cut into about 150 units, some of them of many files."""
    folder = tmp_path_factory.mktemp("corpus")
    inputs = folder / "in"
    inputs.mkdir()
    texts = make_texts(1500)
    write_lines(inputs / "a.jsonl", texts[:600])
    (inputs / "b.txt").write_text("\n".join(make_texts(300, seed=5)))
    write_gzip(folder / "c.jsonl.gz", texts[500:900]).rename(inputs / "c.jsonl.gz")
    write_parquet(inputs / "d.parquet", texts[900:1200])
    for number, text in enumerate(texts[1200:]):
        (inputs / f"e{number:04d}.txt").write_text(text)
    save_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def expected(corpus: Path) -> dict[str, bytes]:
    """What an undisturbed preparation in one process gives."""
    prepare(corpus / "out", corpus / "in", tokenizer=corpus / "tokenizer.json", deduplicate=True)
    verify_prepared(str(corpus / "out"), lambda line: None)
    return contents(corpus / "out")


def start(corpus: Path, output: Path, program: str = PROGRAM) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", program, corpus / "tokenizer.json", output, corpus / "in"]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE)


def finish(corpus: Path, output: Path) -> None:
    process = start(corpus, output)
    errors = process.communicate(timeout=180)[1]
    assert process.returncode == 0, errors.decode()


def asked(corpus: Path, output: Path, **changes: Any) -> PrepareRequest:
    options = {"tokenizer": corpus / "tokenizer.json", "deduplicate": True, **changes}
    return request(output, corpus / "in", **options)


class Tasks:
    """As a cluster's tasks do it, in any order."""

    def __init__(self, count: int, seed: int) -> None:
        self.ranks = random.Random(seed).sample(range(count), count)

    def run(self, work: Work, advance: object) -> None:
        for rank in self.ranks:
            tokenize_share(Work.load(work.folder), rank, len(self.ranks))


@pytest.mark.parametrize("executor", ["processes", "tasks"])
def test_who_does_the_work_changes_nothing(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, executor: str, seed: int
) -> None:
    who: Executor = LocalProcesses(3) if executor == "processes" else Tasks(seed % 40 + 2, seed)
    run.prepare(asked(corpus, tmp_path / "out"), executor=who)
    assert contents(tmp_path / "out") == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "out.lock"]


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    """The parent alone or all processes die, when any number of shards is done."""
    generator = random.Random(seed)
    output = tmp_path / "out"
    counts = []
    for attempt in range(4):
        wanted = generator.randint(1, 20) + (counts[-1] if counts else 0)
        process = start(corpus, output)
        while process.poll() is None and number_done(output) < wanted:
            time.sleep(0.001)
        time.sleep(generator.random() * 0.02)
        if process.returncode is not None:  # it came to its end first
            assert process.returncode == 0, process.communicate()[1].decode()
            break
        members = psutil.Process(process.pid).children(recursive=True)
        if attempt % 2:
            for member in members:
                member.kill()
        process.kill()
        process.communicate()
        wait_for_end(members)
        if output.exists():  # the kill came after the end
            break
        counts.append(number_done(output))
    assert counts[0] > 0
    if not output.exists():
        finish(corpus, output)
    assert contents(output) == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "out.lock"]


def number_done(output: Path) -> int:
    return len(list(output.with_name(f"{output.name}.work").glob("0*.json")))


def wait_for_end(processes: list[psutil.Process]) -> None:
    """Fail if one of them works on."""
    end = time.monotonic() + 120
    while any(is_working(process) for process in processes):
        assert time.monotonic() < end, "a worker outlives its parent"
        time.sleep(0.01)


def is_working(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


STEPS = ("card_of", "sync_folder", "shards.Folder.remove")


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_the_end_it_ends_the_same(
    corpus: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    step: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = asked(corpus, tmp_path / "out")
    is_last = step == "shards.Folder.remove"

    def die(*arguments: Any, **options: object) -> None:
        if not is_last or str(arguments[0].path).endswith(".work"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        module = "hysparse_megatron.data.prepare"
        patch.setattr(f"{module}.{step}" if is_last else f"{module}.run.{step}", die)
        with pytest.raises(KeyboardInterrupt):
            run.prepare(made)
    assert (tmp_path / "out").exists() == is_last
    run.prepare(made)
    assert contents(tmp_path / "out") == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "out.lock"]


def test_a_damaged_shard_is_made_again(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", make_texts(200))
    whole = prepare(tmp_path / "whole", source)
    unfinished(tmp_path / "out", source)
    shards = sorted((tmp_path / "out.work").glob("0*.shard"))
    assert len(shards) > 5
    flipped = bytearray(shards[2].read_bytes())
    flipped[10] ^= 1
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    shards[2].write_bytes(flipped)
    for shard in shards[:3]:
        with pytest.raises(DataError, match=f"{shard.name}: damaged since it was written"):
            prepare(tmp_path / "out", source)
    assert not (tmp_path / "out").exists()
    assert prepare(tmp_path / "out", source).fingerprint == whole.fingerprint


def unfinished(output: Path, source: Path, **options: Any) -> None:
    """Leave all shards of a preparation and no output."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hysparse_megatron.data.prepare.run.assemble", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(output, source, **options)


def test_other_options_are_refused_before_and_after_the_end(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", make_texts(200))
    output = tmp_path / "out"
    unfinished(output, source)
    with pytest.raises(ConfigError, match=r"out\.work: .*text_key: 'text' -> 'body'.*--overwrite"):
        prepare(output, source, text_key="body")
    # What only shapes the assembly may still change.
    first = prepare(output, source, seed=5)
    notes = contents(output)
    assert prepare(output, source, seed=5) == first
    with pytest.raises(ConfigError, match=r"prepared from other inputs or with other options"):
        prepare(output, source, seed=6)
    assert contents(output) == notes
    other = run.prepare(request(output, source, seed=6), overwrite=True)
    assert other is not None
    assert other.fingerprint != first.fingerprint
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "out", "out.lock"]


def test_what_ends_documents_is_an_option_wherever_it_is_said(tmp_path: Path) -> None:
    """Documents of one corpus would end with two different tokens, or with the wrong one still."""
    source = write_lines(tmp_path / "a.jsonl", make_texts(200))
    output, folder = tmp_path / "out", tmp_path / "tokenizer"
    folder.mkdir()
    save_tokenizer(folder / "tokenizer.json")
    unfinished(output, source, tokenizer=folder)
    beside = folder / "tokenizer_config.json"
    beside.write_text('{"eos_token": "a"}')
    with pytest.raises(ConfigError, match=r"end_of_document: '<\|endoftext\|>' -> 'a'"):
        prepare(output, source, tokenizer=folder)
    beside.unlink()
    assert prepare(output, source, tokenizer=folder).end_of_document == 0
    beside.write_text('{"eos_token": "a"}')
    with pytest.raises(ConfigError, match="with other options"):
        prepare(output, source, tokenizer=folder)


def test_what_begins_documents_is_an_option_too(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", make_texts(200))
    output, folder = tmp_path / "out", tmp_path / "tokenizer"
    folder.mkdir()
    save_sentencepiece(folder / "tokenizer.model")
    unfinished(output, source, tokenizer=folder)
    beside = folder / "tokenizer_config.json"
    beside.write_text('{"add_bos_token": true}')
    with pytest.raises(ConfigError, match="begin_of_document: None -> '<s>'"):
        prepare(output, source, tokenizer=folder)
    beside.unlink()
    assert prepare(output, source, tokenizer=folder).begin_of_document is None
    beside.write_text('{"add_bos_token": true}')
    with pytest.raises(ConfigError, match="with other options"):
        prepare(output, source, tokenizer=folder)


def test_changed_input_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", make_texts(200))
    unfinished(tmp_path / "out", source)
    with source.open("a") as stream:
        stream.write('{"text": "more"}\n')
    with pytest.raises(ConfigError, match="input files changed"):
        prepare(tmp_path / "out", source)
    made = request(tmp_path / "out", source)
    run.prepare(made, overwrite=True)
    assert verify_prepared(str(tmp_path / "out"), print).bad_documents == 0


def test_a_folder_of_other_files_is_never_touched(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", make_texts(50))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    for output, message in ((tmp_path / "out", "holds other files"), (source, "is a file")):
        if output == source:
            message = "lies inside the input"
        with pytest.raises(ConfigError, match=message):
            run.prepare(request(output, source), overwrite=True)
    (tmp_path / "other.work").mkdir()
    (tmp_path / "out").rename(tmp_path / "other.work" / "out")
    with pytest.raises(ConfigError, match=r"other\.work: holds other files"):
        run.prepare(request(tmp_path / "other", source), overwrite=True)
    assert (tmp_path / "other.work" / "out" / "thesis.tex").read_text() == "mine"


def test_an_output_may_be_a_link_and_no_file_system(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", make_texts(20))
    plain = prepare(tmp_path / "plain", source)
    for name, exists in (("there", True), ("not yet", False)):
        target = tmp_path / "large disk" / name
        (target if exists else target.parent).mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
        made = prepare(tmp_path / name, source)
        assert (made.directory, made.fingerprint) == (str(target), plain.fingerprint)
        assert prepare(tmp_path / name, source) == made
        assert (tmp_path / name).is_symlink()
    with pytest.raises(ConfigError, match="/proc: is where a file system begins; name a folder"):
        prepare(Path("/proc"), source)


def test_two_preparations_of_one_output_cannot_run_at_once(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", make_texts(50))
    with open(tmp_path / "out.lock", "w") as stream:
        stream.write("node-1 process 42")
        stream.flush()
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"out\.lock: still held by node-1 process 42"):
            prepare(tmp_path / "out", source)
    prepare(tmp_path / "out", source)


def test_a_full_disk_is_named_and_leaves_nothing_that_looks_finished(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Writing fails first for a worker's shard, then for the assembled file."""
    for limit in (2_000, 100_000):
        program = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2)\n"
        process = start(corpus, tmp_path / "out", program + PROGRAM)
        errors = process.communicate(timeout=180)[1].decode()
        assert process.returncode == 5, errors
        assert "cannot write prepared data: File too large" in errors
        assert "Traceback" not in errors
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob("out.work/**/*.tmp"))
    finish(corpus, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_a_killed_worker_ends_the_preparation_with_advice(corpus: Path, tmp_path: Path) -> None:
    process = start(corpus, tmp_path / "out")
    while number_done(tmp_path / "out") < 3:
        time.sleep(0.001)
    psutil.Process(process.pid).children()[0].kill()
    errors = process.communicate(timeout=180)[1].decode()
    assert process.returncode == 1
    assert "a worker process was killed" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "validation.bin", "tokenizer.json"])
def test_verify_finds_every_flipped_bit(
    expected: dict[str, bytes], tmp_path: Path, name: str, seed: int
) -> None:
    for file, content in expected.items():
        (tmp_path / file).write_bytes(content)
    flipped = bytearray(expected[name])
    flipped[seed % len(flipped)] ^= 1 << seed % 8
    (tmp_path / name).write_bytes(flipped)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        verify_prepared(str(tmp_path), lambda line: None)


def test_verify_finds_a_document_that_is_not_closed(
    expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Also where the card's hashes were made from the wrong tokens."""
    for file, content in expected.items():
        (tmp_path / file).write_bytes(content)
    card = json.loads(expected["dataset.json"])
    card["end_of_document"] = 7
    (tmp_path / "dataset.json").write_text(json.dumps(card))
    with pytest.raises(DataError, match=r"train\.bin: document 0 ends with token 0 .* expected 7"):
        verify_prepared(str(tmp_path), lambda line: None)
