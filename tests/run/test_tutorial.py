"""Every command and program of docs/tutorial.md runs, in its order; training is cut short."""

import re
import shlex
from pathlib import Path

import pytest
from run_commands import ROOT, read_json, run, write_text

from hysparse_megatron.data.tokenizer import train_tokenizer
from tests.captured import captured
from tests.docs.blocks import blocks_of

pytestmark = [pytest.mark.distributed, pytest.mark.thorough]

SHORT = [
    "train.steps=4",
    "train.seq_length=128",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.eval_interval=2",
    "train.eval_batches=1",
    "optim.warmup_steps=1",
    "optim.decay_steps=1",
    "checkpoint.interval=2",
    "tracking.sample_tokens=3",
    "data.tokenizer_vocab_size=600",
]
"""Minutes become seconds; the model, its four ranks and its cut stay."""
ENDS = {"compare": 1}
"""Commands whose exit code is not 0: runs that are not the same end with 1."""


def of_make(line: str) -> list[str]:
    """What `make` runs, as words after `hysparse`."""
    words = ["make", "--no-print-directory", "--dry-run", *shlex.split(line)[1:]]
    done = captured(words, cwd=ROOT)
    [launched] = re.findall(r"hysparse (launch .*)$", done.stdout, flags=re.M)
    return [*shlex.split(launched), *SHORT]


def reader_has(folder: Path, seed: int) -> Path:
    """What the tutorial takes for granted: a text, a larger one, and a tokenizer."""
    text = write_text(folder / "text", seed)
    write_text(folder / "web", seed + 1)
    documents = [path.read_text() for path in sorted((folder / "web").iterdir())]
    train_tokenizer(documents, 500).save(str(folder / "tokenizer.json"))
    return text


def test_every_command_runs_in_its_order(
    tmp_path: Path, session_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = reader_has(tmp_path, session_seed)
    told: dict[str, str] = {}
    page = ROOT / "docs" / "tutorial.md"
    order = page.read_text().index  # of first lines, which are all different
    for block in sorted(blocks_of(page), key=lambda block: order(block.text.splitlines()[0])):
        if block.language == "python":
            exec(block.text, {})
            continue
        for line in block.commands:
            line = line.replace("/data/text", str(text))
            words = of_make(line) if line.startswith("make ") else shlex.split(line)[1:]
            entry, code = ("-m", "hysparse_megatron.main"), ENDS.get(words[0], 0)
            told[line] = run(words, entry=entry, cwd=tmp_path, code=code)
    assert len(told) > 10
    for name in ("quickstart", "full", "mine", "web"):
        assert read_json(tmp_path / "runs" / name / "status.json")["state"] == "finished"
    for path in ("runs/quickstart/report.html", "comparison.html", "exported/quickstart/README.md"):
        assert (tmp_path / path).stat().st_size > 1000, path
