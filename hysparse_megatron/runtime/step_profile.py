"""`debug.profile`: some steps of a run, operation by operation.

With torch.profiler the chosen ranks each write a trace to the run directory, for
https://ui.perfetto.dev or chrome://tracing. With nsys they mark the steps and their operations by
NVTX ranges between cudaProfilerStart and cudaProfilerStop, and Nsight Systems, under which the run
was started, records them. Both show the names of `runtime.annotations`.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hysparse_megatron.config.debug import ProfileConfig, ProfileTool
from hysparse_megatron.errors import ConfigError, HySparseError

FOLDER = "profile"
"""In the run directory."""

Around = Callable[[int], AbstractContextManager[None]]
"""Goes around a step, by its number from 1."""


def refuse_unusable(settings: ProfileConfig, device: torch.device) -> None:
    """Raise ConfigError if the tool cannot record on this device."""
    if settings.step_range and settings.tool is ProfileTool.nsys and device.type != "cuda":
        raise ConfigError(
            f"debug.profile.tool: nsys needs a CUDA device, this is {device.type}; use torch"
        )


@contextlib.contextmanager
def profiled(
    settings: ProfileConfig,
    run_path: Path,
    rank: int,
    steps_done: int,
    log: Callable[[str], None],
    lost: Callable[[OSError], None],
) -> Iterator[Around]:
    """What goes around every step of a start that goes on after `steps_done`, on every rank.

    Steps that were recorded before a stop, which all ranks raise as an error of ours, are written
    too. `lost` is told why a trace cannot be written, instead of an error that would leave the
    other ranks waiting.
    """
    if settings.step_range is None:
        yield lambda step: contextlib.nullcontext()
        return
    first, last = settings.step_range
    first = max(first, steps_done + 1)
    if last < first:
        given = f"debug.profile.step_range: {settings.step_range} lie before step {steps_done + 1}"
        log(f"WARNING: {given}, where this start goes on: nothing is profiled")
        yield lambda step: contextlib.nullcontext()
        return
    ranks = ", ".join(map(str, settings.ranks))
    log(f"profiling {_steps(first, last)} on rank {ranks} with {settings.tool.value}")
    if rank not in settings.ranks:
        yield lambda step: contextlib.nullcontext()
        return
    recorder = _Recorder(settings.tool, first, last, rank, run_path / FOLDER, lost)
    try:
        yield recorder.around
    except HySparseError:
        recorder.finish()
        raise


def _steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"


class _Recorder:
    """Records from `first` to `last` on one rank, with what the loop does between these steps."""

    def __init__(
        self,
        tool: ProfileTool,
        first: int,
        last: int,
        rank: int,
        folder: Path,
        lost: Callable[[OSError], None],
    ) -> None:
        self._tool, self._first, self._last = tool, first, last
        self._rank, self._folder, self._lost = rank, folder, lost
        self._recording = ExitStack()
        self._trace: profile | None = None
        self._newest: int | None = None
        """The last step that was recorded to its end."""

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Record `step` if it is among them; the last one ends the recording."""
        if not self._first <= step <= self._last:
            yield
            return
        if step == self._first:
            self._start()
        with record_function(f"step {step}"):
            yield
        self._newest = step
        if step == self._last:
            self.finish()

    def _start(self) -> None:
        if self._tool is ProfileTool.nsys:
            torch.cuda.profiler.start()
            self._recording.callback(torch.cuda.profiler.stop)
            self._recording.enter_context(torch.autograd.profiler.emit_nvtx())
        else:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            # Accumulating only keeps it from warning of cycles, of which there is one.
            self._trace = profile(activities=activities, acc_events=True)
            self._recording.enter_context(self._trace)

    def finish(self) -> None:
        """Stop recording, if it goes on, and write what was recorded."""
        trace, self._trace = self._trace, None
        self._recording.close()
        if trace is None or self._newest is None:
            return
        steps = _steps(self._first, self._newest)
        path = self._folder / f"rank{self._rank}-{steps.replace(' ', '-')}.json.gz"
        try:
            _write(trace, path)
        except OSError as error:
            print(f"WARNING: rank {self._rank}: {path}: {error}", file=sys.stderr, flush=True)
            self._lost(error)
        else:
            print(f"rank {self._rank}: the profile of {steps} is {path}", flush=True)


def _write(trace: profile, path: Path) -> None:
    """Raises OSError; nothing is left then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        plain, packed = Path(folder) / "trace.json", Path(folder) / path.name
        trace.export_chrome_trace(str(plain))
        # What it cannot write it leaves out without an error.
        with plain.open("rb") as source:
            source.seek(-min(64, plain.stat().st_size), os.SEEK_END)
            if not source.read().rstrip().endswith(b"}"):
                raise OSError("the profiler could not write all of its trace")
            source.seek(0)
            with gzip.open(packed, "wb", compresslevel=6) as file:
                shutil.copyfileobj(source, file)
        packed.replace(path)
