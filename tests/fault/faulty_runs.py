"""Starts runs with faults in them, and checks what every ending has in common."""

import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from hysparse_megatron.checkpoint.store import MANIFEST, published, step_directory, step_of
from hysparse_megatron.runtime.faults import VARIABLE
from hysparse_megatron.runtime.last_words import WAIT_SECONDS
from tests.run.run_commands import (
    LOCAL,
    TINY,
    TRAIN,
    Command,
    environment_of,
    processes_naming,
    read_json,
    rows,
)

TIMEOUT = 20
"""Seconds that ranks wait for each other. Only faults that stop a rank wait for so long; imports
on a busy machine differ by a few seconds between ranks."""

STEPS = 12

SETTINGS = [
    *TINY,
    "model.hidden_dropout=0.1",
    "debug.log_sample_ids=true",
    f"train.steps={STEPS}",
    "train.eval_interval=4",
    "checkpoint.interval=4",
    # A save beside training might not be complete a few such short steps later.
    "checkpoint.asynchronous=false",
    f"parallel.timeout_seconds={TIMEOUT}",
]


def short(steps: int) -> list[str]:
    """Settings of a run that is over soon: no warm-up and decay, which would not fit."""
    return [f"train.steps={steps}", "optim.warmup_steps=0", "optim.decay_steps=0"]


FOUR_RANKS = ["parallel=tp2_pp2", "model.layout=F S | S F"]

SECONDS_TO_NOTICE = 2
"""From the timeout after a rank's end or stop to the end of all others."""


class FaultyRun:
    """One run directory, and starts in it."""

    def __init__(self, run_dir: Path, data: Sequence[str], ranks: int = 2) -> None:
        self.run_dir = run_dir
        self.ranks = ranks
        self.settings = [*SETTINGS, *data, f"run_dir={run_dir}"]
        self._started: list[Command] = []

    def take_over(self, other: "FaultyRun", step: int) -> None:
        """Stand where `other` stood after `step` steps, of which it has a checkpoint."""
        shutil.copytree(other.run_dir, self.run_dir)
        (self.run_dir / "status.json").unlink()
        for newer in (found for found in self.checkpoints() if found > step):
            shutil.rmtree(self.checkpoint(newer))
        assert self.checkpoints()[-1] == step
        kept = [json.dumps(row) + "\n" for row in rows(self.run_dir) if row["step"] <= step]
        (self.run_dir / "metrics.jsonl").write_text("".join(kept))

    def start(
        self,
        *overrides: str,
        fault: str = "",
        whose_output_ends_at: str | None = None,
        **variables: str,
    ) -> Command:
        """Start all ranks by the launcher; nobody reads their output from some text on."""
        arguments = ["--nproc", str(self.ranks), *self.settings, *overrides]
        variables |= {VARIABLE: fault}
        return self._keep(
            Command(
                arguments,
                entry=LOCAL,
                closes_after=whose_output_ends_at,
                **variables,
            )
        )

    def start_rank(self, rank: int, port: int, *overrides: str, **variables: str) -> Command:
        """Start one rank without a launcher."""
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        arguments = [*self.settings, *overrides]
        return self._keep(Command(arguments, entry=TRAIN, **place, **variables))

    def _keep(self, command: Command) -> Command:
        self._started.append(command)
        return command

    def run(self, *overrides: str, code: int, fault: str = "", **variables: str) -> str:
        """Start all ranks and expect them to end with `code`, all of them; returns the output."""
        command = self.start(*overrides, fault=fault, **variables)
        found = command.finish()
        assert found == code, command.output
        self.assert_nothing_left()
        return command.output

    def assert_nothing_left(self) -> None:
        """No process of this run is alive."""
        end = time.monotonic() + 5
        while (left := processes_naming(f"run_dir={self.run_dir}")) and time.monotonic() < end:
            time.sleep(0.05)
        assert left == []

    def assert_ended(self, state: str, code: int, rank: int | None, cause: str) -> None:
        """`status.json` says so; `cause` is a pattern."""
        status = self.status()
        found = (status["state"], status["exit_code"], status["rank"])
        assert found == (state, code, rank), status
        assert re.search(cause, status["cause"]), status["cause"]
        assert status["host"]

    def status(self) -> dict[str, Any]:
        return read_json(self.run_dir / "status.json")

    def row(self, step: int) -> dict[str, Any]:
        """The last row of a training step."""
        return next(r for r in reversed(rows(self.run_dir)) if r["step"] == step and "loss" in r)

    def sample_ids(self) -> list[list[int]]:
        """Of every step of a run that is done."""
        return [self.row(step)["sample_ids"] for step in range(1, STEPS + 1)]

    def checkpoint(self, step: int) -> Path:
        return step_directory(self.run_dir / "checkpoints", step)

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints that are complete."""
        found = published(self.run_dir / "checkpoints")
        return sorted(step_of(path) for path in found if (path / MANIFEST).exists())

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        """Everything in a checkpoint that is a tensor: parameters, moments, step counts."""
        found: dict[str, Any] = {}
        _load_state_dict(
            found,
            storage_reader=FileSystemReader(self.checkpoint(step)),
            planner=_EmptyStateDictLoadPlanner(),
            no_dist=True,
        )
        return dict(_tensors(found))

    def close(self) -> None:
        """Leave nothing behind, whatever a test found."""
        for command in self._started:
            if command.process.poll() is None:
                command.kill()
        for line in processes_naming(f"run_dir={self.run_dir}"):
            with suppress(ProcessLookupError):
                os.kill(int(line.partition(":")[0]), signal.SIGKILL)


def _tensors(tree: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _tensors(value, f"{name}/{key}")


def assert_equal(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    assert len(tensors) > 30
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def rank_pids(run: FaultyRun) -> list[int]:
    """Process ids of the ranks of a run, rank 0 first."""
    found = {}
    for line in processes_naming(f"run_dir={run.run_dir}"):
        pid, _, command = line.partition(":")
        if "-m hysparse_megatron" in command:
            found[int(environment_of(Path("/proc") / pid)["RANK"])] = int(pid)
    return [found[rank] for rank in sorted(found)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def seconds_of_the_end(command: Command, after: str) -> float:
    """How long a command takes to end once it has written `after`."""
    command.wait_for(after)
    started = time.monotonic()
    command.finish()
    return time.monotonic() - started - WAIT_SECONDS
