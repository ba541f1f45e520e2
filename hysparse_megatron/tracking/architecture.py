"""Evaluations that also say what the architecture does: see `model/probe.py`.

Means go into the evaluation's row, the selections of the sample into `selections.jsonl`: one line
an evaluation with `step`, `block_size`, `positions` of the queries, `document_starts` from which
their blocks count, and `layers`, by oracle layer the blocks that each query selects.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hysparse_megatron.model.probe import Findings, Probe

SELECTIONS_FILE = "selections.jsonl"
"""In the run directory. As in `metrics.jsonl` the last line of a step counts."""


class ArchitectureWatch:
    """Watches evaluations on every rank, and writes selections on those with a `run_path`."""

    def __init__(self, probe: Probe, block_size: int, run_path: Path | None) -> None:
        self._probe = probe
        self._block_size = block_size
        self._file = None if run_path is None else run_path / SELECTIONS_FILE

    @contextlib.contextmanager
    def observe(self, step: int) -> Iterator[Callable[[], dict[str, Any]]]:
        """Watch what is evaluated within, after `step` steps.

        Calling what it gives, when the evaluation is done, returns fields for its row. Collective.
        """
        with self._probe.watching():
            yield lambda: self._report(step)

    def _report(self, step: int) -> dict[str, Any]:
        found = self._probe.gather()
        if self._file is not None and found.selections:
            self._write(step, found)
        return {**found.values, "architecture_seconds": found.seconds}

    def _write(self, step: int, found: Findings) -> None:
        line = {
            "step": step,
            "block_size": self._block_size,
            "positions": found.positions,
            "document_starts": found.document_starts,
            "layers": found.selections,
        }
        assert self._file is not None
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_selections(run_path: Path) -> dict[int, dict[str, Any]]:
    """What `selections.jsonl` says, by step; empty where there is none."""
    path = run_path / SELECTIONS_FILE
    if not path.exists():
        return {}
    found = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last line of a killed run
        row["layers"] = {int(layer): rows for layer, rows in row["layers"].items()}
        found[row["step"]] = row
    return found
