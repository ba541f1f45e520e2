"""Prints rows as tables while they are measured."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from hysparse_kernels.benchmarking.report import Report
from hysparse_kernels.benchmarking.targets import Target

from benchmarks.checks import Check
from benchmarks.rates import Rates
from benchmarks.rows import Row

_HEADER = (
    f"  {'implementation':58s} {'pass':9s}{'median':>10s}  {'quartiles':>19s}"
    f"{'TF/s':>7s}{'of floor':>10s}{'extra memory':>14s}"
)


@dataclass
class TableReport(Report):
    """One table after the other."""

    _section: tuple[str, str, str | None] | None = None

    def row(self, row: Row) -> None:
        """One row, under a heading of its own if it starts a table."""
        section = (row.table, str(row.problem), row.selection)
        if section != self._section:
            self._section = section
            selection = f", {row.selection} selection" if row.selection else ""
            self.log()
            self.log(f"{row.table}: {row.problem}{selection}")
            self.log(_HEADER)
        self.log(format_row(row))

    def write_all(
        self, rates: Rates, checks: list[Check], rows: list[Row], targets: list[Target]
    ) -> None:
        """Everything measured so far."""
        content = {
            "rates": asdict(rates),
            "checks": [asdict(check) for check in checks],
            "rows": [row.as_json() for row in rows],
        }
        self.write(content, targets)


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
    if row.tokens_per_second is not None:
        extra = f"  {row.tokens_per_second:,.0f} tokens/s"
    if row.bytes_per_token is not None:
        extra += f", reads {row.bytes_per_token / 1e6:.2f} MB a token"
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
