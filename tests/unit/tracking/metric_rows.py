"""Rows of `metrics.jsonl`, as tests write them, and a run directory for them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hysparse_megatron.tracking.metrics import MetricsFile


def row(step: int, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "grad_norm": 0.5,
        "learning_rate": 1e-3,
        "tokens": 100 * step,
        "tokens_per_second": 50.0 * step,
        "step_seconds": 2.0,
        "skipped": False,
        **more,
    }


def evaluation(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "eval_loss": loss, "eval_seconds": 0.1}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    metrics = MetricsFile(path)
    for one in rows:
        metrics.write(one)
    metrics.close()


def run_directory(path: Path) -> Any:
    """A folder with the places that a run directory has."""
    path.mkdir(exist_ok=True)
    places = {"metrics": path / "metrics.jsonl", "checkpoints": path / "checkpoints"}
    return SimpleNamespace(path=path, **places)
