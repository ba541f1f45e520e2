"""What a benchmark prints, and the text and JSON files that keep it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hysparse_kernels.benchmarking.targets import Target

if TYPE_CHECKING:
    import torch

_PACKAGES = ("triton", "fla-core", "megatron-core", "transformer-engine")


def environment(device: torch.device | str, command: str) -> dict[str, Any]:
    """What runs where, with which versions."""
    import torch  # here, as a command that only says what it takes has no use for it

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.device(device).type == "cuda":
        versions["cuDNN"] = str(torch.backends.cudnn.version())
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU, {torch.get_num_threads()} threads"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "device": name,
        "versions": versions,
        "command": command,
    }


@dataclass
class Report:
    """Collects what is printed. `path` is the text file, the JSON lies beside it; or None."""

    path: Path | None
    facts: dict[str, Any]
    """Of the `environment`."""
    lines: list[str] = field(default_factory=list)

    def log(self, line: str = "") -> None:
        """Print a line and keep it."""
        print(line, flush=True)
        self.lines.append(line)

    def heading(self) -> None:
        """What runs where."""
        versions = "  ".join(f"{name} {number}" for name, number in self.facts["versions"].items())
        self.log(f"{self.facts['date']}  {self.facts['device']}  {versions}")
        self.log(f"command: {self.facts['command']}")

    def write(self, content: dict[str, Any], targets: Sequence[Target] = ()) -> None:
        """Both files, whole; called after every table, so that an interrupted run leaves some.

        Raises OSError.
        """
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join(self.lines) + "\n")
        met = [{**asdict(target), "met": target.met} for target in targets]
        text = json.dumps({**self.facts, **content, "targets": met}, indent=1)
        self.path.with_suffix(".json").write_text(text + "\n")
