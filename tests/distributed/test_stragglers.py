"""A slow rank is named, in the row and on the console; who waits for it is not."""

import dataclasses
import re
import socket

import pytest

from hysparse_megatron.config.schema import Config, TrackingConfig
from tests.distributed.cases import INSIDE, Case
from tests.distributed.pool import WorkerPool
from tests.distributed.straggler_jobs import measured_steps

pytestmark = pytest.mark.alone

STEPS, INTERVAL, SLEEP = 6, 3, 2.5
MEMORY = "peak_memory_bytes"


def config_of(case: Case) -> Config:
    tracking = TrackingConfig(straggler_interval=INTERVAL, straggler_factor=3.0)
    return dataclasses.replace(case.config(), tracking=tracking)


@pytest.mark.parametrize(
    ("case", "slow"),
    [
        (Case("dp2", dp=2), 1),
        (Case("dp4", dp=4, train={"global_batch_size": 16}), 2),
        # Ranks 0 and 1 are the first stage; the second waits for its input and is not slow.
        (Case("pp2_dp2", INSIDE, pp=2, dp=2), 1),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_a_slow_rank_is_named(case: Case, slow: int, pool: WorkerPool) -> None:
    config = config_of(case)
    fault = f"slow@{slow}:2:{SLEEP}"
    ranks = pool.run(case.world_size, measured_steps, config=config, fault=fault, steps=STEPS)
    rows = ranks[0][0]
    for other, told in ranks[1:]:
        assert other[INTERVAL - 1]["slowest_ranks"] == rows[INTERVAL - 1]["slowest_ranks"]
        assert told == ranks[0][1], "all ranks see alike"
        assert [row[MEMORY] for row in other] == [row[MEMORY] for row in rows]

    assert ["slowest_ranks" in row for row in rows] == [False, False, True, False, False, True]
    row = rows[INTERVAL - 1]
    assert row["data_seconds_max"] == case.world_size - 1
    named = row["slowest_ranks"]
    assert len(named) == min(3, case.world_size)
    assert (named[0]["rank"], named[0]["host"]) == (slow, socket.gethostname())
    # The mean of two steps, because the first does not count.
    assert named[0]["seconds"] == row["forward_seconds_max"] >= SLEEP / 2
    # Nobody else sleeps; waiting for the slow one does not count.
    assert all(entry["seconds"] < SLEEP / 4 for entry in named[1:])
    others = [entry["seconds"] for entry in named[1:]]
    assert row["forward_seconds_min"] <= min(others)
    assert row["forward_seconds_min"] <= row["forward_seconds_median"] < SLEEP / 2

    # Later steps take milliseconds, which the machine's other work may make uneven.
    (line,) = [line for line in ranks[0][1] if "steps 2-3" in line]
    assert re.fullmatch(
        rf"WARNING: rank {slow} on {socket.gethostname()} is slow: [\d.]+ s of forward passes a "
        r"step, [\d.]+ times the median of its pipeline stage \(mean of steps 2-3\)",
        line,
    )
