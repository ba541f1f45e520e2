"""Evaluations that also say what the architecture does: see `model/probe.py`.

Means go into the evaluation's row, the selections of the sample into `selections.jsonl`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hysparse_megatron.model.probe import Probe
from hysparse_megatron.tracking.selections import write_selections


class ArchitectureWatch:
    """Watches evaluations on every rank, and writes selections on those with a `run_path`.

    `lost` is told why they cannot be written, instead of an error on one rank alone.
    """

    def __init__(
        self, probe: Probe, block_size: int, run_path: Path | None, lost: Callable[[OSError], None]
    ) -> None:
        self._probe = probe
        self._block_size = block_size
        self._run_path = run_path
        self._lost = lost

    @contextlib.contextmanager
    def observe(self, step: int) -> Iterator[Callable[[], dict[str, Any]]]:
        """Watch what is evaluated within, after `step` steps.

        Calling what it gives, when the evaluation is done, returns fields for its row. Collective.
        """
        with self._probe.watching():
            yield lambda: self._report(step)

    def _report(self, step: int) -> dict[str, Any]:
        found = self._probe.gather()
        if self._run_path is not None and found.selections:
            line = {
                "step": step,
                "block_size": self._block_size,
                "positions": found.positions,
                "document_starts": found.document_starts,
                "layers": found.selections,
            }
            try:
                write_selections(self._run_path, line)
            except OSError as error:
                self._lost(error)
        return {**found.values, "architecture_seconds": found.seconds}
