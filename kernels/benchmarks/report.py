"""Prints rows as tables while they are measured, and writes the text and a JSON beside it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.bars import Bar
from benchmarks.checks import Check
from benchmarks.rates import Rates
from benchmarks.rows import Row

_HEADER = (
    f"  {'implementation':58s} {'pass':9s}{'median':>10s}  {'quartiles':>19s}"
    f"{'TF/s':>7s}{'of floor':>10s}{'extra memory':>14s}"
)


def environment(device: torch.device, command: str) -> dict[str, Any]:
    """What ran where, with which versions."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "fla-core", "megatron-core"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
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
    lines: list[str] = field(default_factory=list)
    _section: tuple[str, str, str | None] | None = None

    def say(self, line: str = "") -> None:
        """Print a line and keep it."""
        print(line, flush=True)
        self.lines.append(line)

    def heading(self) -> None:
        """What ran where."""
        versions = "  ".join(
            f"{name} {version}" for name, version in self.facts["versions"].items()
        )
        self.say(f"{self.facts['date']}  {self.facts['device']}  {versions}")
        self.say(f"command: {self.facts['command']}")

    def row(self, row: Row) -> None:
        """One row, under a heading of its own if it starts a table."""
        section = (row.table, str(row.problem), row.selection)
        if section != self._section:
            self._section = section
            selection = f", {row.selection} selection" if row.selection else ""
            self.say()
            self.say(f"{row.table}: {row.problem}{selection}")
            self.say(_HEADER)
        self.say(format_row(row))

    def write(self, rates: Rates, checks: list[Check], rows: list[Row], bars: list[Bar]) -> None:
        """Both files, whole; called after every table, so that an interrupted run leaves some."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join(self.lines) + "\n")
        content = {
            **self.facts,
            "rates": asdict(rates),
            "checks": [asdict(check) for check in checks],
            "rows": [row.as_json() for row in rows],
            "bars": [{**asdict(bar), "met": bar.met} for bar in bars],
        }
        self.path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


def format_row(row: Row) -> str:
    """One printed line."""
    start = f"  {row.label:58s} {row.step:9s}"
    if row.timing is None:
        return f"  {row.label:58s} {row.note}"
    timing = row.timing
    quartiles = f"{timing.low_ms:.2f} .. {timing.high_ms:.2f}"
    flops = f"{row.tflops:7.0f}" if row.tflops else " " * 7
    share = f"{row.floor_ms / timing.median_ms:9.0%} " if row.floor_ms else " " * 10
    extra = f"{row.extra_bytes / 1e6:10.0f} MB" if row.extra_bytes is not None else ""
    if row.tokens_per_second is not None and row.bytes_per_token is not None:
        per_token = f"reads {row.bytes_per_token / 1e6:.2f} MB a token"
        extra = f"  {row.tokens_per_second:,.0f} tokens/s, {per_token}"
        # These take microseconds.
        quartiles = f"{timing.low_ms:.4f} .. {timing.high_ms:.4f}"
        return f"{start}{timing.median_ms:7.4f} ms  {quartiles:>19s}{flops}{share}{extra}"
    return f"{start}{timing.median_ms:7.2f} ms  {quartiles:>19s}{flops}{share}{extra}".rstrip()


def default_path(device: torch.device) -> Path:
    """results/DATE-DEVICE.txt, numbered if there is one already."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    slug = "-".join(name.lower().replace("nvidia", "").split()) or "gpu"
    folder = Path(__file__).parent / "results"
    stem = f"{time.strftime('%Y-%m-%d')}-{slug}"
    number = 1
    while (path := folder / f"{stem}{'' if number == 1 else f'-{number}'}.txt").exists():
        number += 1
    return path
