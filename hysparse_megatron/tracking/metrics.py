"""`metrics.jsonl` and the console: what a run says about itself.

The fields of the rows are listed in docs/tracking.md.
"""

from __future__ import annotations

import contextlib
import html
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hysparse_megatron.config.schema import VALIDATION, TrainConfig
from hysparse_megatron.files import open_lines

MEASURED = frozenset(
    {
        "mfu",
        "peak_memory_bytes",
        "restarts",
        "slowest_ranks",
        "tflops_per_gpu",
        "tokens_per_second",
        "tokens_per_second_per_gpu",
    }
)
"""Fields that say how a step was made and not what came out; so do all fields in seconds."""


def results(row: dict[str, Any]) -> dict[str, Any]:
    """The row without what is measured: repeated steps, and equal runs, have equal results."""
    return {
        key: value for key, value in row.items() if key not in MEASURED and "_seconds" not in key
    }


def evaluation_of(row: dict[str, Any]) -> str:
    """Name of the set that the row is an evaluation on; empty for a step of training."""
    return row.get("evaluation", VALIDATION) if "eval_loss" in row else ""


def by_evaluation(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of evaluations by the set that they are on; steps of training are left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if name := evaluation_of(row):
            found.setdefault(name, []).append(row)
    return found


def chart_values(row: dict[str, Any]) -> dict[str, float | str]:
    """What a tracker can show of a row: numbers and texts, their keys under `train/` or `eval/`.

    Those of a named evaluation set end with its name, so that each has curves of its own.
    """
    name = evaluation_of(row)
    kind, ending = ("eval" if name else "train"), ("" if name in ("", VALIDATION) else f"/{name}")
    return {
        f"{kind}/{key}{ending}": value
        for key, value in row.items()
        if key not in ("step", "evaluation") and isinstance(value, bool | int | float | str)
    }


def sample_html(row: dict[str, Any]) -> str:
    """The text that an evaluation's model wrote, after its prompt, for a tracker's panel."""
    prompt, text = html.escape(row["sample_prompt"]), html.escape(row["sample"])
    return f"<pre><b>{prompt}</b>{text}</pre>"


class MetricsFile:
    """Appends rows to `metrics.jsonl`; each is on disk before the call returns to the loop.

    After a resume rows of repeated steps stand twice; see `standing`. What cannot be written
    is kept, and goes first the next time, from where it was cut.
    """

    def __init__(self, path: Path) -> None:
        open_lines(path).close()
        self._file = path.open("ab", buffering=0)
        self._pending = b""

    def write(self, row: dict[str, Any]) -> None:
        """Append one row. Raises OSError; the row is kept then."""
        self._pending += (json.dumps(row) + "\n").encode()
        self.flush()

    def flush(self) -> None:
        """Write what is kept."""
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]

    def close(self) -> None:
        """Close the file. Raises OSError if rows are lost by that."""
        try:
            self.flush()
        finally:
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of the run as it stands, in the order of steps: see `standing`.

    Of each step, and each evaluation on a set, the last row.
    """
    rows = {(row["step"], evaluation_of(row)): row for row in standing(read_rows(path))}
    return [rows[key] for key in sorted(rows)]


def standing(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what an earlier start did beyond the step at which a later one went on.

    That one may go another way, and not as far, or evaluate after other steps.
    """
    kept: list[dict[str, Any]] = []
    newest = 0
    for row in rows:
        # Steps of training ascend, and each comes before the evaluations after it.
        if not evaluation_of(row):
            if row["step"] <= newest:
                kept = [before for before in kept if before["step"] < row["step"]]
            newest = row["step"]
        kept.append(row)
    return kept


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every row that has a step, as they stand in a file of JSON lines.

    What is no row, such as the last line of a run that was killed or whose disk was full, is left
    out with a warning.
    """
    lost = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        row = None
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
        if isinstance(row, dict) and type(row.get("step")) is int:
            yield row
        elif line.strip():
            lost.append(number)
    if lost:
        text = f"warning: {path}: {len(lost)} lines that are no rows are left out, first line"
        print(f"{text} {lost[0]}", file=sys.stderr, flush=True)


class Console:
    """A line every so many steps on rank 0, and for every step that was left out."""

    def __init__(self, train: TrainConfig, interval: int = 1) -> None:
        self._train = train
        self._interval = interval
        self._is_first = True
        self._samples = 0
        self._started = time.monotonic()

    def step(self, row: dict[str, Any]) -> None:
        """Take a training row; print the first, the last, and those at the interval."""
        # By samples, as the steps of a ramp grow.
        self._samples += row["global_batch_size"]
        total = self._train.steps
        ends, self._is_first = self._is_first or row["step"] == total, False
        if row["step"] % self._interval and not ends and not row["skipped"]:
            return
        samples = self._train.samples_of(total - row["step"], row["samples"])
        remaining = (time.monotonic() - self._started) / self._samples * samples
        skipped = "  SKIPPED" if row["skipped"] else ""
        mfu = f"MFU {100 * row['mfu']:.1f} %  " if row.get("mfu") is not None else ""
        print(
            f"step {row['step']:>{len(str(total))}}/{total}  loss {row['loss']:.4f}  "
            f"grad norm {row['grad_norm']:.3f}  lr {row['learning_rate']:.2e}  "
            f"{row['tokens_per_second']:,.0f} tokens/s  {mfu}ETA {duration(remaining)}{skipped}",
            flush=True,
        )

    def note(self, text: str) -> None:
        """Print a message, indented under nothing."""
        print(text, flush=True)


def duration(seconds: float) -> str:
    """As minutes:seconds, or hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
