"""Starts the product's real commands and watches them."""

import contextlib
import json
import os
import random
import resource
import signal
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hysparse_megatron.tracking.metrics import results
from tests.forks import COMMAND_LINE, ENVIRONMENT, Fork, fork_server

ROOT = Path(__file__).resolve().parents[2]

TRAIN = ("-m", "hysparse_megatron")
LOCAL = ("-m", "launch.local")

TINY = [
    "model.layout=F S F",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.head_dim=8",
    "model.block_size=8",
    "model.num_selected_blocks=2",
    "model.window=8",
    "train.seq_length=64",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.eval_batches=1",
    "data.tokenizer_vocab_size=300",
    "data.validation_fraction=0.2",
    "optim.warmup_steps=2",
    "optim.decay_steps=4",
]

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC")


@dataclass(frozen=True)
class FinishedRun:
    """A run of one process, and what it wrote to its console."""

    run_dir: Path
    arguments: list[str]
    output: str


Copy = Callable[[int], tuple[Path, list[str]]]
"""A run directory that stands after so many steps, and the command that goes on."""


def write_text(folder: Path, seed: int) -> Path:
    """Forty documents of made-up words."""
    generator = random.Random(seed)
    words = [
        "".join(generator.choices(string.ascii_lowercase, k=generator.randint(2, 7)))
        for _ in range(200)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(40):
        text = " ".join(generator.choices(words, k=300))
        (folder / f"document{number:02}.txt").write_text(text)
    return folder


def environment(**more: str) -> dict[str, str]:
    """This process's, without what a launcher or a tracker may have left in it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith((*_LAUNCHER_VARIABLES, "SLURM_", "WANDB_"))
    }
    return {**kept, "PYTHONUNBUFFERED": "1", **more}


class Command:
    """A started command; its output is read by a thread, to its end or to a line with a text."""

    def __init__(
        self,
        arguments: Sequence[str],
        entry: Sequence[str] = TRAIN,
        cwd: Path = ROOT,
        closes_after: str | None = None,
        afresh: bool = False,
        **variables: str,
    ) -> None:
        """`afresh`: by an interpreter of its own, for what a start may break; see `tests.forks`."""
        self.arguments = list(arguments)
        self._closes_after = closes_after
        output, there = os.pipe()
        self._output = os.fdopen(output)
        started = environment(**variables)
        # Interpreters read theirs at their start; CUDA outlasts no fork.
        afresh |= any(name.startswith("PYTHON") for name in variables)
        if afresh or torch.cuda.is_available():
            self.process: Fork | subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, *entry, *arguments],
                cwd=cwd,
                env=started,
                stdin=subprocess.DEVNULL,
                stdout=there,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        else:
            self.process = fork_server().start([*entry, *arguments], there, None, cwd, started)
        os.close(there)
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._output:
            with self._news:
                self._lines.append(line)
                self._news.notify_all()
            if self._closes_after is not None and self._closes_after in line:
                self._output.close()
                return

    @property
    def output(self) -> str:
        """What was written so far, standard error included."""
        return "".join(self._lines)

    def wait_for(self, text: str, timeout_seconds: float = 180.0) -> None:
        """Return as soon as a line holds `text`; fail if the command ends without it."""
        end = time.monotonic() + timeout_seconds
        with self._news:
            while not any(text in line for line in self._lines):
                assert self._reader.is_alive(), f"ended without {text!r}:\n{self.output}"
                assert time.monotonic() < end, f"no {text!r} in time:\n{self.output}"
                self._news.wait(0.2)

    def send(self, number: signal.Signals) -> None:
        """Signal the command's first process alone, as a scheduler or a shell does."""
        self.process.send_signal(number)

    def finish(self, timeout_seconds: float = 240.0) -> int:
        """The exit code."""
        try:
            code = self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"did not end in time:\n{self.output}") from None
        self._reader.join(30)
        return code

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.kill()

    def kill(self) -> None:
        """End the command and everything it started (ranks have sessions of their own)."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def descendants(pid: int) -> list[int]:
    """Children of `pid`, theirs, and so on."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    pending = [pid]
    while pending:
        mine = children.get(pending.pop(), [])
        found += mine
        pending += mine
    return found


def processes_naming(text: str) -> list[str]:
    """Command lines of living processes that hold `text`, such as a run directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = command_line(entry).replace(b"\0", b" ").decode()
            except OSError:
                continue
            if text in line:
                found.append(f"{entry.name}: {line}")
    return found


def command_line(process: Path) -> bytes:
    """Of the process at /proc/...; that of a fork is its own. Raises OSError if it has ended."""
    return _of_fork(process, COMMAND_LINE) or (process / "cmdline").read_bytes()


def environment_of(process: Path) -> dict[str, str]:
    """As `command_line`."""
    found = _of_fork(process, ENVIRONMENT) or (process / "environ").read_bytes()
    lines = (line.partition("=") for line in found.decode().split("\0"))
    return {name: value for name, _, value in lines}


def _of_fork(process: Path, name: str) -> bytes | None:
    """One of its files in memory; None of another process."""
    for opened in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            if f"memfd:{name} " in os.readlink(opened):
                return opened.read_bytes()
    return None


def run(arguments: Sequence[str], *, code: int = 0, **settings: Any) -> str:
    """Run a command, which ends with `code`. Returns its output."""
    with Command(arguments, **settings) as command:
        ended = command.finish()
        assert ended == code, f"{' '.join(arguments)}: {ended}\n{command.output}"
        return command.output


def children_seconds() -> float:
    """Of processors, that ended processes took: however busy the machine is, unlike a clock's."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` as they stand there."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def facts(run_dir: Path) -> dict[tuple[int, bool], dict[str, Any]]:
    """Per step and kind the last row, without how long it took."""
    return {(row["step"], "eval_loss" in row): results(row) for row in rows(run_dir)}


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and content of every file below `folder`."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
