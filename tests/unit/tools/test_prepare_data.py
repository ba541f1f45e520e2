"""`python -m tools.prepare_data`: its options, exit codes, signals and memory."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hysparse_megatron.data.card import load_prepared
from hysparse_megatron.data.prepare.executors import RayTasks, SlurmJobs
from hysparse_megatron.errors import ConfigError, DataError, HySparseError, Preempted
from tests.captured import Call, captured
from tools.measure_prepare import peak_tree_bytes, write_corpus
from tools.prepare_data import _executor, _parser, main

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[3]
COMMAND = [sys.executable, "-m", "tools.prepare_data", "--tokenizer", "bytes"]


def corpus(folder: Path, count: int = 300) -> Path:
    path = folder / "a.jsonl"
    lines = [json.dumps({"body": f"document {number % 250}"}) for number in range(count)]
    path.write_text("\n".join(lines))
    return path


def test_the_whole_command_without_torch(tmp_path: Path) -> None:
    """In processes of its own, with a bar, a summary and a check of the result."""
    program = (
        "import sys; from tools.prepare_data import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 99 * ('torch' in sys.modules))"
    )
    arguments = ["--tokenizer", "bytes", "--text-key", "body", "--deduplicate", "--workers", "2"]
    arguments += ["--verify", "--output", str(tmp_path / "out"), str(corpus(tmp_path))]
    done = captured([sys.executable, "-c", program, *arguments], cwd=ROOT)
    prepared = load_prepared(str(tmp_path / "out"))
    assert prepared.train_documents + prepared.validation_documents == 250
    for expected in ("tokenizing: 100%", "B/s]", "250 documents", "all as its card says"):
        assert expected in done.stderr, done.stderr
    card = json.loads((tmp_path / "out" / "dataset.json").read_text())
    (source,) = card["sources"]
    assert source["bytes"] == (tmp_path / "a.jsonl").stat().st_size
    assert len(source["sha256"]) == 64
    assert card["options"]["deduplicate"] is True
    assert "tokenizers" in card["versions"]


def test_twice_is_once_and_verify_finds_damage(tmp_path: Path, call: Call) -> None:
    command = ["--tokenizer", "bytes", "--text-key", "body", "--workers", "1"]
    command += ["--output", str(tmp_path / "out"), str(corpus(tmp_path))]
    assert call(main, [*command, "--quiet"]).err == ""
    assert "is prepared already" in call(main, command).err
    path = tmp_path / "out" / "train.bin"
    content = bytearray(path.read_bytes())
    content[1] ^= 128
    path.write_bytes(content)
    assert "train.bin" in call(main, ["--output", str(tmp_path / "out"), "--verify"], code=5).err


def test_max_bad(tmp_path: Path, call: Call) -> None:
    path = corpus(tmp_path)
    path.write_text(path.read_text() + '\n{"body": 1}\nno json\n')
    command = ["--tokenizer", "bytes", "--text-key", "body", "--workers", "1", "--quiet"]
    command += ["--output", str(tmp_path / "out"), str(path), "--max-bad"]
    assert "2 bad document(s) so far, 1 allowed" in call(main, [*command, "1"], code=5).err
    assert main([*command, "-1"]) == 0
    assert load_prepared(str(tmp_path / "out")).bad_documents == 2


BAD = [
    ([], 2, "no INPUT"),
    (["INPUT"], 2, "--tokenizer: missing"),
    (["INPUT", "--tokenizer", "bytes", "--workers", "0"], 2, "--workers: got 0"),
    (
        ["INPUT", "--tokenizer", "bytes", "--validation-fraction", "1.5"],
        2,
        "validation fraction 1.5",
    ),
    (["INPUT", "--tokenizer", "nowhere.json"], 5, "cannot read the tokenizer"),
    (["nowhere.jsonl", "--tokenizer", "bytes"], 5, "nowhere.jsonl: cannot be read"),
    (["INPUT", "--tokenizer", "bytes", "--workers", "1"], 5, "missing field 'text'"),
    (["--verify"], 5, "dataset.json: cannot be read"),
    (["INPUT", "--tokenizer", "bytes", "--vocab-size", "300"], 2, "--vocab-size: is for training"),
    (["INPUT", "--tokenizer", "bytes", "--executor", "slurm"], 2, "--slurm-partition: missing"),
    (["INPUT", "--tokenizer", "bytes", "--slurm-partition", "x"], 2, "are for --executor slurm"),
    (["INPUT", "--tokenizer", "bytes", "--cpus-per-task", "2"], 2, "--cpus-per-task: is for a"),
    (["INPUT", "--tokenizer", "bytes", "--end-of-document", "x"], 2, "--end-of-document: is for"),
    (["INPUT", "--vocab-size", "300", "--end-of-document", "x"], 2, "--end-of-document: is for"),
    (["INPUT", "--tokenizer", "bytes", "--begin-of-document", "x"], 2, "--begin-of-document: is"),
    (["INPUT", "--tokenizer", ""], 2, "--tokenizer: is empty"),
    (["", "--tokenizer", "bytes"], 2, "INPUT: is empty"),
    (["INPUT", "--vocab-size", "0"], 2, "a tokenizer of 0 ids: allowed are 257"),
    (["INPUT", "--vocab-size", "10000000000"], 2, "to 16777216 (--vocab-size"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), BAD)
def test_mistakes(
    tmp_path: Path,
    arguments: list[str],
    code: int,
    text: str,
    call: Call,
) -> None:
    source = str(corpus(tmp_path))
    given = [source if argument == "INPUT" else argument for argument in arguments]
    assert text in call(main, ["--output", str(tmp_path / "out"), *given], code=code).err
    assert not (tmp_path / "out").exists()
    assert code == 5 or [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_every_exit_code_is_told() -> None:
    """1 is what a lost process ends a preparation with."""
    texts = _parser().format_help(), (ROOT / "docs" / "data.md").read_text()
    for text, begin in zip(texts, ("Ends with ", "Exit codes: "), strict=True):
        told = text.partition(begin)[2].partition("\n\n")[0]
        for error in (HySparseError, ConfigError, Preempted, DataError):
            assert re.search(rf"\b{error.exit_code}\b", told), (begin, error)


def test_options_of_a_cluster() -> None:
    common = ["--output", "out", "--workers", "9", "--cpus-per-task", "4", "--executor"]
    slurm = ["slurm", "--slurm-partition", "cpu", "--slurm-option", "account=lab"]
    made = _executor(_parser().parse_args([*common, *slurm]))
    assert made == SlurmJobs(9, "cpu", "24:00:00", 4, {"account": "lab"})
    assert _executor(_parser().parse_args([*common, "ray"])) == RayTasks(9, 4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_soon_and_the_same_command_goes_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    source = write_corpus(tmp_path / "a.jsonl", 60_000_000)
    command = [*COMMAND, "--workers", "2", "--output", str(tmp_path / "out"), str(source)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    while process.poll() is None and not list(tmp_path.glob("out.work/0*.json")):
        time.sleep(0.005)
    process.send_signal(number)
    start = time.monotonic()
    errors = process.communicate(timeout=180)[1].decode()
    assert process.returncode == 3, errors
    assert time.monotonic() - start < 30
    assert f"Preempted: stopped by {number.name}; the same command goes on" in errors
    assert "Traceback" not in errors
    assert "going on after" in captured([*command, "--verify"], cwd=ROOT).stderr


def test_ctrl_c_does_not_reach_the_workers(tmp_path: Path) -> None:
    """It goes to all processes of the terminal's group; workers have one of their own."""
    source = write_corpus(tmp_path / "a.jsonl", 5_000_000)
    command = [*COMMAND, "--workers", "2", "--output", str(tmp_path / "out"), str(source)]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    parent = psutil.Process(process.pid)
    while process.poll() is None and len(parent.children()) < 2:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=180)[1]
    assert process.returncode == 3, errors
    assert errors.rstrip().endswith("Preempted: stopped by SIGINT; the same command goes on")
    assert "Traceback" not in errors
    assert "interrupted" not in errors


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """Peak of all processes together, with duplicates looked for and the result checked.

    Bytes are tokenized ten times faster than words, and make four times the tokens. For larger
    inputs see `tools/measure_prepare.py`.
    """
    peaks = []
    for size in (20_000_000, 100_000_000):
        source = write_corpus(tmp_path / "a.jsonl", size)
        command = [*COMMAND, "--workers", "2", "--deduplicate", "--verify", "--quiet"]
        command += ["--output", str(tmp_path / f"out{size}"), str(source)]
        process = subprocess.Popen(command, cwd=ROOT)
        peaks.append(peak_tree_bytes(process))
        assert process.returncode == 0
    assert peaks[1] < peaks[0] + 32e6, peaks
