"""TensorBoard beside `metrics.jsonl`; whatever goes wrong here never stops a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hysparse_megatron.tracking.metrics import chart_values, sample_html

FOLDER = "tensorboard"
"""In the run directory; all starts of a run write into it."""

_FLUSH_SECONDS = 30


class TensorBoard:
    """Writes rows as scalars, or does nothing after a failure."""

    def __init__(self, run_path: Path, first_step: int, warn: Callable[[str], None]) -> None:
        """Go on after `first_step` steps: what an earlier start wrote beyond them is left out."""
        self._warn = warn
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(run_path / FOLDER), purge_step=first_step + 1, flush_secs=_FLUSH_SECONDS
            )
        except Exception as error:
            warn(f"TensorBoard did not start: {error}")

    def log(self, row: dict[str, Any]) -> None:
        """Write one row, its keys under `train/` or `eval/`."""
        if self._writer is None:
            return
        try:
            for key, value in chart_values(row).items():
                if not isinstance(value, str):
                    self._writer.add_scalar(key, value, row["step"])
            if "sample" in row:
                self._writer.add_text("eval/sample", sample_html(row), row["step"])
        except Exception as error:
            self._warn(f"TensorBoard stopped: {error}. Training goes on, metrics.jsonl is complete")
            self._writer = None

    def close(self, exit_code: int) -> None:
        """Write what is left."""
        if self._writer is not None:
            try:
                self._writer.close()
            except Exception as error:
                self._warn(f"TensorBoard did not finish: {error}")
            self._writer = None
