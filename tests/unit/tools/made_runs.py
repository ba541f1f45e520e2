"""Run directories with made-up rows, for the tools that look at runs."""

import json
import random
from pathlib import Path
from typing import Any

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.frozen import freeze
from tests.checkpoints import write_step

DATA = {"fingerprint": "abc", "train_tokens": 1000}


def step_row(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 5.0 / step,
        "grad_norm": 1.0 + step % 3,
        "learning_rate": 1e-3,
        "tokens": 512 * step,
        "tokens_per_second": random.uniform(90, 110),
        "tokens_per_second_per_gpu": 25.0,
        "tflops_per_gpu": 0.5,
        "mfu": None,
        "peak_memory_bytes": 3 * 2**30,
        "restarts": 0,
        "step_seconds": random.uniform(1, 2),
        "skipped": False,
        **more,
    }


def evaluation_row(step: int, **more: Any) -> dict[str, Any]:
    values = {
        f"{quantity}/layer_{layer:03}": 0.5 + step / 100
        for quantity, layer in (("oracle_mass", 0), ("sparse_gate", 1), ("window_sink", 1))
    }
    return {"step": step, "eval_loss": 4.0 - step / 10, "eval_seconds": 0.3, **values, **more}


def with_text(row: dict[str, Any]) -> dict[str, Any]:
    """The row of an evaluation after which the model wrote something."""
    return {**row, "sample_prompt": "if a <", "sample": f" b & {row['step']}:\n    c"}


def rows(steps: int) -> list[dict[str, Any]]:
    """Rows of so many steps, with an evaluation before them and after every fourth."""
    found = [evaluation_row(0)]
    for step in range(1, steps + 1):
        found.append(step_row(step))
        if step % 4 == 0:
            found.append(evaluation_row(step))
    return found


def make_run(
    path: Path,
    made: list[dict[str, Any]],
    *overrides: str,
    run_id: str = "id1",
    data: Any = DATA,
    starts: int = 1,
) -> Path:
    """A run directory with these rows, a checkpoint after step 4 and selections after it."""
    config = compose([f"run_dir={path}", "train.steps=12", *overrides])
    config_hash = freeze(config, path)
    start = {
        "time": "2026-01-01T00:00:00Z",
        "host": "node-7",
        "device": "Fast GPU",
        "ranks": 3,
        "versions": {"torch": "9.9"},
        "cluster": "local",
        "config_hash": config_hash,
        "git": {"commit": "c0ffee" * 6, "dirty": True, "diff": "code.diff"},
        "slurm_job": "4711",
    }
    record = {"id": run_id, "name": config.name, "starts": [start] * starts}
    (path / "run.json").write_text(json.dumps(record))
    (path / "status.json").write_text(json.dumps({"state": "running", "step": 4}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    write_step(path / "checkpoints", 4, {"tokens": 2048, "data": data})
    line = {
        "step": 4,
        "block_size": 8,
        "positions": [3, 20, 41],
        "document_starts": [0, 0, 24],
        "layers": {"0": [[0], [0, 2], [0, 1]]},
    }
    (path / "selections.jsonl").write_text(json.dumps(line) + "\n")
    return path
