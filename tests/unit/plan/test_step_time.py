"""Seconds of a step: what data parallelism adds to them."""

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


def test_what_is_sent_between_steps_makes_a_step_longer() -> None:
    beside, apart = _time(), _time(*APART)
    assert apart.pipeline_seconds == beside.pipeline_seconds
    assert apart.data_seconds > beside.data_seconds >= 0
    slow = _time("cluster.node_bandwidth_gb=1")
    assert slow.data_seconds > 0
