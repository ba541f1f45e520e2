"""What NCCL did last: PyTorch's flight recorder, written to the run directory after a timeout.

Every rank keeps its last collectives in a ring (what, how large, by which line, finished or not).
When one of them waits longer than the timeout, all ranks write theirs to `RUN_DIR/logs/`, and

    .venv/bin/torchfrtrace RUN_DIR/logs --prefix nccl_rank_

says which ranks did not come to which collective. Set up by environment variables that NCCL's
process groups read when they are made; what the user has set stays. gloo has none of this.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

LOG_FOLDER = "logs"
"""In the run directory."""

FILE_PREFIX = "nccl_rank_"
"""The number of the rank follows."""

BUFFER_ENTRIES = 20_000
"""Collectives that a rank keeps: some steps of a deep pipeline, a few tens of megabytes.

PyTorch's own 2000 are less than one such step has."""

_OLDER_NAMES = {
    "TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE": "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
}
"""PyTorch 2.11 reads both and prefers the new ones, which must not win over a user's old ones."""


def set_defaults(run_path: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what is not set. Call it before the first process group is made."""
    defaults = {
        "TORCH_FR_BUFFER_SIZE": str(BUFFER_ENTRIES),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(run_path.absolute() / LOG_FOLDER / FILE_PREFIX),
    }
    for name, value in defaults.items():
        if _OLDER_NAMES.get(name, name) not in environment:
            environment.setdefault(name, value)
