"""Whole runs that stop and go on with other batch sizes and ranks: nothing twice, nothing never."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hysparse_megatron.data.read.order import sample_ids
from hysparse_megatron.tracking.metrics import read_metrics
from tests.distributed.pool import WorkerPool
from tests.distributed.position_jobs import start
from tests.run.run_commands import TINY, read_json

pytestmark = pytest.mark.distributed

SEQ_LENGTH = 64


def write_text(folder: Path, seed: int) -> None:
    """Short documents, so that samples have several: some 60 samples in all."""
    draw = random.Random(seed)
    folder.mkdir()
    for number in range(60):
        words = ["".join(draw.choices("aeinrst", k=draw.randint(2, 7))) for _ in range(40)]
        (folder / f"{number:02}.txt").write_text(" ".join(words))


def manifest_of(run_dir: Path, step: int) -> dict[str, Any]:
    return read_json(run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json")


@pytest.fixture
def settings(session_seed: int, tmp_path: Path) -> list[str]:
    """Of a run on a small corpus of its own."""
    write_text(tmp_path / "text", session_seed)
    return [
        *TINY,
        f"data.path={tmp_path / 'text'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"run_dir={tmp_path / 'run'}",
        "train.micro_batch_size=1",
        "train.eval_batches=0",
        "debug.log_sample_ids=true",
        "checkpoint.keep=0",
        "tracking.mode=offline",
        "tracking.architecture=false",
        "optim.schedule=constant",
        "optim.decay_steps=null",
    ]


def test_two_epochs_of_a_run_that_is_stopped_again_and_again(
    pool: WorkerPool, session_seed: int, settings: list[str], tmp_path: Path
) -> None:
    """On one rank and on two, with documents masked and not: neither changes what is read."""
    draw = random.Random(session_seed)
    # Larger, smaller and growing.
    sizes = [["8"], ["2"], ["12", "[4,4,30]"], ["16"]]
    tracked: dict[int, float] = {}

    def go_on(ranks: int, steps: int, size: list[str], *others: str) -> None:
        changes = [f"train.steps={steps}", f"train.global_batch_size={size[0]}", *others]
        changes += [f"train.batch_ramp={ramp}" for ramp in size[1:]]
        sent = pool.run(ranks, start, overrides=[*settings, *changes])[0]
        steps_sent = (row for row in sent if "train/tokens" in row)
        tracked.update({row["train/step"]: row["train/tokens"] for row in steps_sent})

    ends = [0]
    for number, size in enumerate(draw.sample(sizes, k=len(sizes))):
        ends.append(ends[-1] + draw.randint(2, 4))
        go_on(1 + number % 2, ends[-1], size, f"data.document_mask={number > 1}")
    # Back over starts with other sizes, and on from there to the end of the second epoch: with the
    # sizes of the start, whichever were drawn, these two make three.
    go_on(2, ends[2] + 3, ["6"], f"checkpoint.step={ends[2]}", "data.document_mask=true")
    manifest = manifest_of(tmp_path / "run", ends[2] + 3)
    num_samples = (manifest["data"]["train_tokens"] - 1) // SEQ_LENGTH
    steps = ends[2] + 3 + -(-(2 * num_samples - manifest["samples"]) // 10)
    go_on(1, steps, ["10"])

    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    read: list[int] = []
    for row in rows:
        read += row["sample_ids"]
        assert row["global_batch_size"] == len(row["sample_ids"])
        assert row["samples"] == len(read)
        assert row["tokens"] == tracked[row["step"]] == len(read) * SEQ_LENGTH
    for step in (ends[1], ends[2], ends[2] + 3, steps):
        manifest, row = manifest_of(tmp_path / "run", step), rows[step - 1]
        assert (manifest["samples"], manifest["tokens"]) == (row["samples"], row["tokens"])
    for epoch in range(2):
        once = read[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(once) == list(range(num_samples))
    assert len({row["global_batch_size"] for row in rows}) >= 3


def test_a_checkpoint_of_an_early_version_goes_on_where_it_stood(
    pool: WorkerPool, settings: list[str], tmp_path: Path
) -> None:
    """Its manifest has tokens, of batches of one size, and no samples."""
    settings = [*settings, "data.skip_steps='1,4'"]
    first = ["train.steps=3", "train.global_batch_size=4"]
    pool.run(1, start, overrides=[*settings, *first])
    path = tmp_path / "run" / "checkpoints" / "step-00000003" / "manifest.json"
    manifest = read_json(path)
    for newer in ("manifest_sha256", "model", "optim", "run_id", "samples", "settings"):
        del manifest[newer]
    del manifest["progress"]["position"]
    path.write_text(json.dumps(manifest))
    pool.run(1, start, overrides=[*settings, "train.steps=5", "train.global_batch_size=8"])

    data = manifest["data"]
    order = sample_ids(
        np.arange(60),
        seed=1234,
        fingerprint=data["fingerprint"],
        num_samples=(data["train_tokens"] - 1) // SEQ_LENGTH,
    ).tolist()
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    # The second of four and the first of eight are left out.
    taken = [order[0:4], order[8:12], order[12:16], order[24:32], order[32:40]]
    assert [row["sample_ids"] for row in rows] == taken
    assert [row["samples"] for row in rows] == [4, 8, 12, 20, 28]
    assert rows[-1]["tokens"] == manifest_of(tmp_path / "run", 5)["tokens"] == 28 * SEQ_LENGTH
