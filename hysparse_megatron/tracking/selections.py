"""`selections.jsonl`: what the sampled queries of each evaluation read. Imports no torch.

One line an evaluation: `step`, `block_size`, `positions` of the queries in their sequence,
`document_starts` from which their blocks count, and `layers`, by oracle layer the blocks of each
query. As in `metrics.jsonl` what a start went back from does not count.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hysparse_megatron.files import open_lines
from hysparse_megatron.tracking.metrics import read_rows, standing

SELECTIONS_FILE = "selections.jsonl"
"""In the run directory."""


def write_selections(run_path: Path, line: dict[str, Any]) -> None:
    """Append a line."""
    with open_lines(run_path / SELECTIONS_FILE) as file:
        file.write(json.dumps(line) + "\n")


def read_selections(run_path: Path) -> dict[int, dict[str, Any]]:
    """The lines by step, their layers as numbers; empty where there is no file."""
    path = run_path / SELECTIONS_FILE
    if not path.exists():
        return {}
    found = {}
    for row in standing(read_rows(path)):
        row["layers"] = {int(layer): rows for layer, rows in row["layers"].items()}
        found[row["step"]] = row
    return found
