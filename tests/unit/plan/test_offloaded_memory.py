"""What plans say of activations that wait in host memory."""

import json

import pytest

from hysparse_megatron.config.compose import compose
from hysparse_megatron.plan.memory import RankMemory
from hysparse_megatron.plan.offload import (
    HOST_BANDWIDTH_GB,
    ON_ITS_WAY,
    HostCopies,
    exposed_seconds,
)
from hysparse_megatron.plan.overview import Overview, make_overview
from hysparse_megatron.plan.report import as_text, as_values

OFFLOAD = "train.offload_activations=true"
LONG = ["experiment=long_7b_128k", "train.recompute=full"]


def planned(*settings: str, ranks: int = 64) -> Overview:
    return make_overview(compose([*LONG, *settings]), ranks)


def memory(*settings: str) -> RankMemory:
    return planned(*settings).ranks[0].memory


def test_inputs_of_layers_leave_the_device() -> None:
    """With full recompute all but the last layer's: two of 36 are there, and two blocks' keys."""
    plain, there = memory(), memory(OFFLOAD)
    row = 131072 // (8 * 4) * 4096 * 2  # tokens of a rank, with sequence parallelism
    shared = 131072 * 2 * 256 * 2  # of all tokens, 2 KV groups on a rank
    assert plain.activations["residual stream and norms"] == 36 * row
    assert there.activations["residual stream and norms"] == row
    assert there.activations[ON_ITS_WAY] == 2 * row + 2 * shared - row
    assert there.total < plain.total
    assert there.host is not None
    assert plain.host is None
    oracles = 9
    assert there.host.host_bytes == 35 * row + oracles * shared
    assert there.host.step_bytes == 16 * there.host.microbatch_bytes
    assert there.host.step_seconds == there.host.step_bytes / (HOST_BANDWIDTH_GB * 1e9)


def test_a_pipeline_keeps_every_micro_batch_in_flight_on_the_host() -> None:
    layout = "model.layout=4*(F 3*S) | 4*(F 3*S) F 2*S F"
    settings = ("parallel.pp=2", "parallel.cp=4", layout)
    first, last = (rank.memory for rank in planned(*settings, OFFLOAD).ranks)
    assert first.host is not None
    assert last.host is not None
    assert first.micro_batches_in_flight == 2 * last.micro_batches_in_flight
    assert first.host.host_bytes == 2 * first.host.microbatch_bytes
    assert last.host.host_bytes == last.host.microbatch_bytes
    # What the second stage received is the schedule's, and the model's last layer stays.
    row = 131072 // (4 * 4) * 4096 * 2
    assert last.activations["residual stream and norms"] == 2 * row


@pytest.mark.parametrize(
    ("seconds", "longer"),
    [(0.5, 0.0), (1.0, 0.0), (1.5, 0.5), (3.0, 2.0 + 1.0)],
)
def test_copies_take_time_where_computing_is_shorter(seconds: float, longer: float) -> None:
    """Beside a forward pass of a second and a backward pass of two."""
    copied = round(seconds * HOST_BANDWIDTH_GB * 1e9)
    found = exposed_seconds(HostCopies(copied, copied, copied), 1, 1.0, 3.0)
    assert found == pytest.approx(longer)
    assert exposed_seconds(None, 1, 1.0, 3.0) == 0


def test_a_plan_is_as_long_as_copies_make_it() -> None:
    """Those of full recompute hide, those of all activations do not."""
    assert planned(OFFLOAD).time.seconds == pytest.approx(planned().time.seconds)
    keeping = planned("train.recompute=none").time.seconds
    assert planned("train.recompute=none", OFFLOAD).time.seconds > 1.05 * keeping


def test_it_is_written_and_said() -> None:
    overview = planned(OFFLOAD)
    host = overview.ranks[0].memory.host
    assert host is not None
    text = as_text(overview)
    assert f"activations on the host: {host.host_bytes / 2**30:.2f} GiB of the fullest" in text
    assert f"{8 * host.host_bytes / 2**30:.1f} GiB a machine" in text
    assert "Not compared with the machines' memory" in text
    assert f"{host.step_seconds:.3g} s each way at 50 GB/s" in text
    values = json.loads(json.dumps(as_values(overview)))["ranks"][0]
    assert values["host"]["step_bytes"] == host.step_bytes
    sizes = values["memory_bytes"]
    parts = [size for name, size in sizes.items() if name not in ("total", "activations")]
    assert sizes["total"] == sum(parts) + sum(sizes["activations"].values())


def test_nothing_is_said_where_nothing_waits() -> None:
    assert "on the host" not in as_text(planned())
    small = planned(OFFLOAD, "train.offload_min_bytes=4000000000")
    assert small.ranks[0].memory == memory()
    assert "no activation waits on the host" in as_text(small)
