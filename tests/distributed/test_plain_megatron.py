"""`examples/plain_megatron.py` trains as this project's own loop does, and is short."""

import dataclasses
import re
import socket
from pathlib import Path

import pytest
import torch

from examples import plain_megatron
from hysparse_megatron.config.schema import OptimConfig, Schedule
from hysparse_megatron.runtime import megatron_on_cpu
from hysparse_megatron.training.state import build_state
from hysparse_megatron.training.step import train_step
from tests.distributed.cases import reference_of
from tests.distributed.pool import WorkerPool
from tests.run.run_commands import Command

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "plain_megatron.py"
OPTIM = OptimConfig(
    learning_rate=1e-3,
    min_learning_rate=1e-3,
    schedule=Schedule.constant,
    # As in the example, which leaves megatron-core's defaults as they are.
    beta2=0.999,
    epsilon=1e-8,
    weight_decay=0.0,
)


def own_loop(rank: int) -> list[float]:
    """Losses of the example's model and tokens in this project's loop, on one process."""
    megatron_on_cpu.install()
    config = reference_of(dataclasses.replace(plain_megatron.CONFIG, optim=OPTIM))
    state = build_state(config, plain_megatron.VOCAB, torch.device("cpu"))
    losses = []
    for step in range(config.train.steps):
        batches = [
            {
                "tokens": ids[:, :-1].contiguous(),
                "labels": ids[:, 1:].contiguous(),
                "loss_mask": torch.ones(ids.shape[0], ids.shape[1] - 1),
                "position_ids": torch.arange(ids.shape[1] - 1).expand(ids.shape[0], -1),
            }
            for ids in plain_megatron.tokens_of(step)
        ]
        losses.append(train_step(state, step, batches).loss)
    return losses


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_example_gives_the_losses_of_our_loop(pool: WorkerPool) -> None:
    """On tensor parallel 2 x pipeline parallel 2, with a cut inside a hybrid block."""
    program = f"import runpy; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    place = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        Command([], entry=("-c", program), RANK=str(rank), LOCAL_RANK=str(rank), **place)
        for rank in range(4)
    ]
    assert [rank.finish() for rank in ranks] == [0] * 4, "".join(rank.output for rank in ranks)
    told = "".join(rank.output for rank in ranks)
    losses = [float(loss) for loss in re.findall(r"^step \d+ loss (\S+)$", told, flags=re.M)]
    (expected,) = pool.run(1, own_loop)
    assert len(losses) == plain_megatron.TRAIN.steps
    assert losses == pytest.approx(expected, abs=1e-6)
    assert losses[-1] < losses[0] - 0.1
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 100
