"""The table of compared layouts at the end of a session, from the reports of all its workers."""

from typing import NamedTuple

import pytest

ROW = "parity row"
"""The name under which tests record lines of the table."""


class ParityRow(NamedTuple):
    """One line of the table."""

    name: str
    ranks: int
    loss: float
    grad_norm: float
    gradient: float
    selections: str
    redrawn: int
    """Batches of the reference with near-ties, drawn anew."""
    smallest_gap: float
    """Between the scores of blocks that were left, in the reference."""
    verdict: str


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = [
        ParityRow(*value)
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call"
        for name, value in report.user_properties
        if name == ROW
    ]
    if not rows:
        return
    terminalreporter.section("layouts compared with one process")
    width = max(len(row.name) for row in rows)
    terminalreporter.write_line(
        f"{'layout':{width}}  ranks  max loss diff  max grad-norm diff  "
        "max rel. gradient diff  selections  redrawn  smallest gap  verdict"
    )
    for row in rows:
        terminalreporter.write_line(
            f"{row.name:{width}}  {row.ranks:5}  {row.loss:13.1e}  {row.grad_norm:18.1e}  "
            f"{row.gradient:22.1e}  {row.selections:10}  {row.redrawn:7}  "
            f"{row.smallest_gap:12.1e}  {row.verdict}"
        )
