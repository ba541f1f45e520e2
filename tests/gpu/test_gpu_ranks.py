"""Training over two GPUs with NCCL against one GPU: whole commands, every way to split a model.

With fewer than two GPUs every test here is skipped.
"""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.gpu.trained import EXPERTS, MODEL, PRECISIONS, STEPS
from tests.run.run_commands import LOCAL, facts, run, write_text

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

MQA = ["model.num_query_groups=1", "model.qkv_bias=true"]
TENSOR = ["parallel.tp=2", "parallel.sequence_parallel=true"]
SPLITS = {
    "one": [],
    "dp2": [],
    "tp2": TENSOR,
    "pp2": ["parallel.pp=2", "model.layout=F S | S F S W"],
    "cp2": ["parallel.cp=2"],
    "mqa-one": MQA,
    "mqa-tp2": [*MQA, *TENSOR],
    "experts-one": EXPERTS,
    "experts-ep2": [*EXPERTS, "parallel.ep=2"],
    "experts-tp2": [*EXPERTS, *TENSOR],
    "experts-cp2-ep2": [*EXPERTS, "parallel.cp=2", "parallel.ep=2"],
}
# fp32 products of a GPU round otherwise than in another order; bf16 has three digits.
TOLERANCES = {"fp32": 2e-4, "bf16": 2e-2}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpus")
    text = write_text(folder / "text", random.SystemRandom().randrange(2**31))
    found = [*MODEL, f"data.path={text}", f"data.cache_dir={folder / 'cache'}"]
    # It prepares the data for all others.
    train("one", "fp32", folder / "first", [*found, "train.steps=8"])
    return found


def train(split: str, precision: str, run_dir: Path, settings: list[str]) -> str:
    count = "1" if split.endswith("one") else "2"
    arguments = [
        *settings,
        *SPLITS[split],
        *PRECISIONS[precision],
        f"train.precision={precision}",
        f"run_dir={run_dir}",
    ]
    return run(["--nproc", count, *arguments], entry=LOCAL)


@pytest.fixture(scope="module")
def runs(
    settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """The directories of finished runs, by split and precision; some at a time."""
    folder = tmp_path_factory.mktemp("runs")
    wanted = {
        (split, precision): folder / f"{split}-{precision}"
        for split in SPLITS
        for precision in PRECISIONS
    }
    with ThreadPoolExecutor(7) as pool:
        list(pool.map(lambda item: train(*item[0], item[1], settings), wanted.items()))
    return wanted


def losses(run_dir: Path) -> list[float]:
    rows = facts(run_dir)
    return [rows[step, False]["loss"] for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("split", [name for name in SPLITS if not name.endswith("one")])
def test_two_gpus_train_like_one(
    split: str, precision: str, runs: dict[tuple[str, str], Path]
) -> None:
    of_model = f"{split.split('-')[0]}-" if "-" in split else ""
    alone = losses(runs[f"{of_model}one", precision])
    found = losses(runs[split, precision])
    assert alone[-1] < alone[0]
    differences = [abs(a - b) for a, b in zip(alone, found, strict=True)]
    print(f"{split} {precision}: {max(differences):.1e}")
    assert max(differences) <= TOLERANCES[precision]


def test_a_run_goes_on_split_otherwise(
    settings: list[str], runs: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    """Five steps with tensor parallelism, the others with pipeline parallelism."""
    run_dir = tmp_path / "run"
    for split, steps in (("tp2", 5), ("pp2", STEPS)):
        output = train(split, "fp32", run_dir, [*settings, f"train.steps={steps}"])
    assert "resuming after step 5" in output
    straight = losses(runs["one", "fp32"])
    assert losses(run_dir)[5:] == pytest.approx(straight[5:], abs=TOLERANCES["fp32"])
