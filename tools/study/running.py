"""Run what a study still lacks, through the ordinary training command, for so many minutes.

A run that the time did not suffice for stays in its work folder and goes on from there; one whose
result stands is never run again. Several run side by side where GPUs, or a small model, leave room.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hysparse_megatron.command import import_paths
from hysparse_megatron.data.card import load_prepared
from hysparse_megatron.errors import NumericalStop, Preempted
from hysparse_megatron.tracking.metrics import read_metrics

from .plan import Run, Study
from .results import Result, path_of, read_result, thinned, write_result

_CLOCK = "study-seconds"
_RESERVE_SECONDS = 60.0


@dataclass(frozen=True)
class Place:
    """Where a portion of a study works, and for how long."""

    data: Path
    """Folder of prepared datasets: `train`, and those that evaluations name."""
    results: Path
    work: Path
    jobs: int
    deadline: float
    """As `time.monotonic()`."""
    settings: tuple[str, ...] = ()
    """Overrides for all runs that decide no result, and that no fingerprint knows of."""

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()


def run_portion(study: Study, place: Place, variants: Sequence[str]) -> list[Run]:
    """Run until `variants` are finished or the time is over; returns what is not finished.

    Raises ConfigError for results that were made with other settings, CalledProcessError for a
    command that failed; runs beside it end first.
    """
    data = load_prepared(str(place.data / "train"), check_tokens=False).fingerprint
    lacking = [
        run
        for run in study.runs
        if run.variant in variants and not read_result(place.results, run, run.fingerprint(data))
    ]
    with ThreadPoolExecutor(place.jobs) as pool:
        for future in [pool.submit(_work, study, run, place, data) for run in lacking]:
            future.result()
    return [run for run in lacking if not path_of(place.results, run).exists()]


def _work(study: Study, run: Run, place: Place, data: str) -> None:
    folder = place.work / run.name
    if place.seconds_left < _RESERVE_SECONDS or _is_hopeless(study, place, folder):
        return
    started = time.monotonic()
    environment = _environment(_slot(), place.jobs)
    log = place.work / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        code = _train(run, place, folder, log, environment)
        if code == Preempted.exit_code:
            return
        stopped = _cause(folder) if code == NumericalStop.exit_code else ""
        found = {} if stopped else dict(_evaluate(study, run, place, folder, log, environment))
    finally:
        seconds = _add_seconds(folder, time.monotonic() - started)
    rows = read_metrics(folder / "metrics.jsonl")
    result = Result(
        run=run.name,
        fingerprint=run.fingerprint(data),
        device=_device(),
        seconds=round(seconds, 1),
        tokens_per_second=statistics.median(
            row["tokens_per_second"] for row in rows if "tokens_per_second" in row
        ),
        rows=thinned(rows),
        evaluations=found,
        stopped=stopped,
    )
    write_result(place.results, run, result)
    if not stopped:  # otherwise they tell why
        shutil.rmtree(folder / "checkpoints")


def _cause(folder: Path) -> str:
    """What the run itself says it ended for."""
    return str(json.loads((folder / "status.json").read_text(encoding="utf-8"))["cause"])


def _is_hopeless(study: Study, place: Place, folder: Path) -> bool:
    """Whether a run is not worth starting: none of its kind has ever fitted into what is left."""
    if folder.exists():
        return False
    taken = [found.seconds for run in study.runs if (found := read_result(place.results, run))]
    return bool(taken) and place.seconds_left < 0.8 * min(taken)


def _train(run: Run, place: Place, folder: Path, log: Path, environment: Mapping[str, str]) -> int:
    command = [
        *(sys.executable, "-m", "hysparse_megatron", *run.overrides, *place.settings),
        f"name={run.name}",
        f"run_dir={folder}",
        f"data.path={place.data / 'train'}",
        f"train.deadline_minutes={max(1.0, place.seconds_left / 60):.2f}",
    ]
    ended = (0, Preempted.exit_code, NumericalStop.exit_code)
    return _call(command, log, environment, allowed=ended)


def _evaluate(
    study: Study, run: Run, place: Place, folder: Path, log: Path, environment: Mapping[str, str]
) -> Iterator[tuple[str, Any]]:
    """What each evaluation wrote: the content of JSON, the name of a file beside the results."""
    for name, text in study.evaluations.items():
        output = folder / f"evaluation-{name}"
        words = shlex.split(
            text.format(
                run=shlex.quote(str(folder)),
                data=shlex.quote(str(place.data)),
                output=shlex.quote(str(output)),
            )
        )
        _call([sys.executable, "-m", "hysparse_megatron.main", *words], log, environment)
        for path in sorted(folder.glob(f"{output.name}.*")):
            if path.suffix == ".json":
                # Where the machine had it is nobody's business afterwards.
                text = path.read_text(encoding="utf-8").replace(f"{place.work}/", "")
                yield name, json.loads(text)
            else:
                kept = place.results / f"{run.name}-{name}{path.suffix}"
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, kept)
                yield name, kept.name


def _call(
    command: list[str], log: Path, environment: Mapping[str, str], allowed: tuple[int, ...] = (0,)
) -> int:
    """Run a command, its output in `log`; its exit code, which must be allowed."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        done = subprocess.run(command, env=dict(environment), stdout=file, stderr=subprocess.STDOUT)
    if done.returncode not in allowed:
        raise subprocess.CalledProcessError(done.returncode, [*command, f"(log: {log})"])
    return done.returncode


def _slot() -> int:
    """Number of the thread that works here, from 0."""
    import threading

    return int(threading.current_thread().name.rsplit("_", 1)[-1])


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """One GPU for every job, in turn, and a share of the cores."""
    import torch

    found = dict(os.environ)
    found["PYTHONPATH"] = import_paths()
    found.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    if torch.cuda.device_count() > 1:
        found["CUDA_VISIBLE_DEVICES"] = str(slot % torch.cuda.device_count())
    return found


def _device() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def _add_seconds(folder: Path, seconds: float) -> float:
    """Seconds of all portions of a run so far, this one included."""
    if not folder.exists():
        return seconds
    path = folder / _CLOCK
    before = float(path.read_text()) if path.exists() else 0.0
    path.write_text(str(before + seconds))
    return before + seconds
