"""`python -m tools.benchmark_checkpoint`: what an asynchronous save costs, beside a synchronous."""

import json
import sys
from pathlib import Path

import pytest

from tests.captured import captured
from tools.benchmark_checkpoint import as_text

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.alone
def test_an_asynchronous_save_stalls_training_for_less_than_a_quarter(tmp_path: Path) -> None:
    smaller = ["model.hidden_size=768", "model.ffn_hidden_size=3072"]
    arguments = [*smaller, "--json", "--repeats", "2", "--directory", str(tmp_path)]
    done = captured(
        [sys.executable, "-W", "ignore", "-m", "tools.benchmark_checkpoint", *arguments], cwd=ROOT
    )
    values = json.loads(done.stdout.splitlines()[-1])
    print(as_text(values))
    assert values["bytes"] > 5e8
    # The best of each: what else the machine does only adds.
    synchronous, asynchronous = (
        min(values[kind]["waited"]) for kind in ("synchronous", "asynchronous")
    )
    assert asynchronous < synchronous / 4
    assert list(tmp_path.iterdir()) == []
