"""`make test`: both halves run whatever the first one finds, and any failure ends red."""

from pathlib import Path

import pytest

from tests.captured import captured

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("codes", "red"),
    [
        ((0, 0), False),
        ((1, 0), True),
        ((0, 1), True),
        ((2, 1), True),
        ((5, 0), False),
        ((0, 5), False),
    ],
)
def test_both_halves_run_and_a_failure_ends_red(
    codes: tuple[int, int], red: bool, tmp_path: Path
) -> None:
    """With a program in Python's place that ends as pytest would; 5 is that no test was chosen."""
    program, calls = tmp_path / "python", tmp_path / "calls"
    program.write_text(
        f'#!/bin/sh\necho "$*" >> {calls}\n'
        f"case $(wc -l < {calls}) in 1) exit {codes[0]};; *) exit {codes[1]};; esac\n"
    )
    program.chmod(0o755)
    # -o: what is installed stays as it is.
    command = ["make", "-o", ".venv/.installed", "test", f"PY={program}", "PYTEST_ARGS=-k some"]
    result = captured(command, cwd=ROOT, code=None)
    first, second = calls.read_text().splitlines()
    assert "-m not alone and not fault and not slurm" in first
    assert "-m alone" in second
    assert all(call.endswith("-k some") for call in (first, second))
    assert (result.returncode != 0) == red, result.stderr
