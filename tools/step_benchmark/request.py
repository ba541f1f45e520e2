"""What a parent asks of a child process, and how the child is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hysparse_megatron.command import import_paths


@dataclass(frozen=True)
class Request:
    """One model to build and step in a process of its own."""

    config: str
    """The frozen configuration, YAML."""
    device: str
    """cuda or cpu."""
    reference: bool = False
    """Whether to build megatron-core's own layers."""
    warmup: int = 0
    steps: int = 1
    budget_seconds: float = float("inf")
    """No further timed step after so long, but for the second."""
    profile: bool = False
    picks: str = "model"
    """Whose selections sparse layers read; see `picks`."""
    layerwise: bool = False
    """Whether keys and values are gathered in every layer; see `splits.LAYERWISE`."""
    same_batch: bool = False
    """Train on one batch over and over, so that even random tokens are learnt."""
    ranks: int = 1
    """Processes that run the case together, each on a device of its own."""


def run(request: Request) -> dict[str, Any]:
    """What the child measured, or {"note": why it did not}."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(asdict(request)))
        command = [sys.executable, "-m"]
        if request.ranks > 1:
            # Whoever fails takes the others along, which would wait for it.
            command += ["torch.distributed.run", "--standalone", "--nproc-per-node"]
            command += [str(request.ranks), "-m"]
        command += [f"{__package__}.child", str(asked), str(answered)]
        done = subprocess.run(
            command,
            env=_environment(request.device),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        try:
            answer = json.loads(answered.read_text())
        except (OSError, ValueError):
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            answer = {"note": f"ended with exit code {done.returncode}: {last}"}
    if "note" in answer or "profile_note" in answer:
        # The note is one line; whoever has to repair something needs the traceback too.
        print(done.stderr, end="", file=sys.stderr)
    return answer


def _environment(device: str) -> dict[str, str]:
    """This process's, but alone: a launcher's variables would make the child wait for others."""
    launcher = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "LOCAL_RANK")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    kept["PYTHONPATH"] = import_paths()
    return {**kept, "CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else kept
