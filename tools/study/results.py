"""What a finished run leaves: one small JSON file, which is all that the table needs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hysparse_megatron.errors import ConfigError
from hysparse_megatron.files import write_whole, writing

from .plan import Run

_KEPT_ROWS = 400
_KEPT_FIELDS = ("step", "loss", "grad_norm", "learning_rate", "tokens", "skipped")


@dataclass(frozen=True)
class Result:
    """Of one run: its curve, thinned, and what every evaluation wrote."""

    run: str
    fingerprint: str
    device: str
    seconds: float
    """From the start of its training to the end of its last evaluation, over all portions."""
    tokens_per_second: float
    """Median over steps."""
    rows: list[dict[str, Any]]
    evaluations: dict[str, Any]
    stopped: str = ""
    """Why its training diverged, and so nothing was evaluated: that too is a result."""


def path_of(results: Path, run: Run) -> Path:
    """Where a run's result stands."""
    return results / f"{run.name}.json"


def read_result(results: Path, run: Run, fingerprint: str | None = None) -> Result | None:
    """The result of a run, None while there is none.

    Raises ConfigError if it was made with other settings or data than `fingerprint`.
    """
    path = path_of(results, run)
    if not path.exists():
        return None
    try:
        result = Result(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not the result of a run: {error}") from error
    if fingerprint is not None and result.fingerprint != fingerprint:
        raise ConfigError(
            f"{path} was made with other settings or data than the study has now: move it away, "
            "or name another folder of results"
        )
    return result


def write_result(results: Path, run: Run, result: Result) -> None:
    """Write it whole or not at all."""
    with writing(results, "--results"):
        results.mkdir(parents=True, exist_ok=True)
        write_whole(path_of(results, run), json.dumps(asdict(result)) + "\n")


def thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of steps at most `_KEPT_ROWS`, evenly, the last among them; evaluations all."""
    steps = [row for row in rows if "loss" in row]
    stride = max(1, -(-len(steps) // _KEPT_ROWS))
    kept = {id(row) for row in steps[::-stride]}
    return [
        {key: row[key] for key in _KEPT_FIELDS if key in row} if "loss" in row else row
        for row in rows
        if "loss" not in row or id(row) in kept
    ]
