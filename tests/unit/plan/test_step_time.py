"""Seconds of a step: what data parallelism adds to them."""

from dataclasses import replace

import pytest

from hysparse_megatron.config.compose import compose
from hysparse_megatron.plan.overview import StepTime, make_overview
from hysparse_megatron.plan.schedule import exposed_seconds

APART = ["parallel.overlap.grad_reduce=false", "parallel.overlap.param_gather=false"]


def _time(*overrides: str) -> StepTime:
    config = compose(["experiment=recipe_8gpu_7b", "cluster=h100", *overrides])
    return make_overview(config, 8).time


@pytest.mark.parametrize(
    ("reducing", "gathering", "exposed"),
    [(1.5, 0.5, 0.0), (3.0, 0.5, 1.0), (1.5, 1.25, 0.25), (3.0, 1.25, 1.25)],
)
def test_each_direction_hides_behind_its_pass(
    reducing: float, gathering: float, exposed: float
) -> None:
    """A micro-batch of 3 s, forward 1 s and backward 2 s."""
    assert exposed_seconds(reducing, gathering, 3.0, 3.0, hidden=True) == pytest.approx(exposed)
    apart = exposed_seconds(reducing, gathering, 3.0, 3.0, hidden=False)
    assert apart == reducing + gathering


def test_instances_of_the_optimizer_keep_most_traffic_near() -> None:
    """TP 2 x DP 8 on two nodes: the 4 of a node gather and scatter, 2 sum a quarter each."""
    config = compose(["experiment=recipe_8gpu_7b", "cluster=h100", *APART])
    several = replace(config.parallel, num_distributed_optimizer_instances=2)
    two = replace(config, parallel=several)
    one, other = (make_overview(each, 16).ranks[0] for each in (config, two))
    held = one.parameters.total
    assert one.traffic.gradient_bytes == pytest.approx(4 * held * 7 / 8)
    assert one.traffic.instance_bytes == 0
    assert other.traffic.gradient_bytes == pytest.approx(4 * held * 3 / 4)
    assert other.traffic.instance_bytes == pytest.approx(4 * held / 4)
    assert other.traffic.weight_bytes == pytest.approx(2 * held * 3 / 4)
    assert other.memory.optimizer == pytest.approx(2 * one.memory.optimizer)
    links = config.cluster
    near, far = links.node_bandwidth_gb * 1e9, links.network_bandwidth_gb * 1e9
    seconds = [make_overview(each, 16).time.data_seconds for each in (config, two)]
    assert seconds[0] == pytest.approx(one.traffic.data_bytes / far)
    within = other.traffic.gradient_bytes + other.traffic.weight_bytes
    assert seconds[1] == pytest.approx(within / near + other.traffic.instance_bytes / far)


def test_what_is_sent_between_steps_makes_a_step_longer() -> None:
    beside, apart = _time(), _time(*APART)
    assert apart.pipeline_seconds == beside.pipeline_seconds
    assert apart.data_seconds > beside.data_seconds >= 0
    slow = _time("cluster.node_bandwidth_gb=1")
    assert slow.data_seconds > 0
