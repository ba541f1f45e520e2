"""What one rank does in the tests of slow ranks; runs inside a worker of `pool.py`."""

import os
import time
from typing import Any
from unittest import mock

from hysparse_megatron.config.schema import Config
from hysparse_megatron.runtime import faults
from hysparse_megatron.tracking.meter import Meter
from hysparse_megatron.training.step import train_step
from tests.distributed.cases import VOCAB, random_tokens
from tests.distributed.ranks import prepare, share_of


def measured_steps(
    rank: int, config: Config, fault: str, steps: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """What the rows of so many steps would say, and what this rank said to the console."""
    with mock.patch.dict(os.environ, {faults.VARIABLE: fault}):
        faults.arm(rank)
    state = prepare(config)
    told: list[str] = []
    meter = Meter(
        config,
        VOCAB,
        state.clock,
        state.device,
        stage=state.groups.pp.rank(),
        restarts=0,
        log=told.append,
    )
    rows = []
    for step in range(steps):
        tokens = random_tokens(7, step, sequences=config.train.global_batch_size)
        started = time.monotonic()
        train_step(state, step, share_of(state, tokens))
        seconds = time.monotonic() - started
        rows.append(meter.measure(step + 1, 3000, seconds, data_seconds=float(rank)))
    return rows, told
