"""On every layout a probe finds what it finds in one process."""

import numpy as np
import pytest

from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.architecture.model import MoeConfig
from hysparse_megatron.model.probe import Findings
from tests.distributed.cases import HALF_BATCH, INSIDE, INTERLEAVED, Case, reference_of
from tests.distributed.conftest import LEAST_GAP, MOST_TRIES
from tests.distributed.pool import WorkerPool
from tests.distributed.probe_jobs import draw, observe

pytestmark = pytest.mark.distributed

EXPERTS = {"moe": MoeConfig(num_experts=4, num_active_experts=2, expert_ffn_hidden_size=32)}
SIZE = {"train": HALF_BATCH}
CASES = [
    Case("tp2-pp2-sp-inside", INSIDE, tp=2, pp=2, sp=True, **SIZE),
    Case("tp2-mqa", tp=2, model={"num_query_groups": 1}, **SIZE),
    Case("pp2-vpp2", INTERLEAVED, pp=2, vpp=2, **SIZE),
    Case("tp2-pp2-sp-documents", INSIDE, tp=2, pp=2, sp=True, documents=True, **SIZE),
    Case("cp2-documents", cp=2, documents=True, **SIZE),
    Case("moe-tp2-sp-ep2", tp=2, sp=True, ep=2, model=EXPERTS, **SIZE),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layout_finds_what_one_process_finds(
    case: Case, pool: WorkerPool, session_seed: int
) -> None:
    config = case.config()
    alone = reference_of(config)
    limits = {"least_gap": LEAST_GAP, "most_tries": MOST_TRIES}
    (tokens,) = pool.run(1, draw, config=alone, seed=session_seed, **limits)
    ((expected, _, _),) = pool.run(1, observe, config=alone, tokens=tokens)
    ranks = pool.run(case.world_size, observe, config=config, tokens=tokens)
    assert_complete(expected, case.layout)
    for found, watched, unwatched in ranks:
        assert found.values == pytest.approx(expected.values, rel=1e-5, abs=1e-6)
        assert found.selections == expected.selections
        assert found.positions == expected.positions
        assert found.document_starts == expected.document_starts
        assert watched == unwatched, "looking changes nothing"
    assert case.documents == (max(expected.document_starts) > 0)


def assert_complete(found: Findings, layout: str) -> None:
    """Every layer has its numbers, and they say something."""
    layers = parse_layout(layout).layers
    read = {plan.oracle for plan in layers if plan.oracle is not None}
    of_oracles = ("oracle_mass", "neighbour_agreement")
    names = {f"{name}/layer_{index:03}" for index in read for name in of_oracles}
    names |= {
        f"{name}/layer_{index:03}"
        for index, plan in enumerate(layers)
        if plan.oracle is not None
        for name in ("sparse_gate", "window_gate", "sparse_sink", "window_sink")
    }
    assert found.values.keys() == names
    masses = [value for name, value in found.values.items() if name.startswith("oracle_mass")]
    assert all(0.2 < mass < 0.999 for mass in masses), masses
    sinks = [value for name, value in found.values.items() if "_sink/" in name]
    assert sinks == pytest.approx([0.5] * len(sinks)), "0, 1/3, 2/3 and 1 for the four heads"
    assert found.selections.keys() == read


def test_data_parallel_ranks_are_averaged(pool: WorkerPool, session_seed: int) -> None:
    """Each looks at its own first micro-batch; the picture is that of the first."""
    config = Case("dp2", dp=2, **SIZE).config()
    (tokens,) = pool.run(
        1, draw, config=reference_of(config), seed=session_seed, least_gap=0.0, most_tries=1
    )
    micro = config.train.micro_batch_size
    parts = [np.concatenate([tokens[first : first + micro]] * 2) for first in (0, micro)]
    alone = [pool.run(1, observe, config=reference_of(config), tokens=part)[0][0] for part in parts]
    ranks = pool.run(2, observe, config=config, tokens=tokens)
    for found, _, _ in ranks:
        for name, value in found.values.items():
            mean = (alone[0].values[name] + alone[1].values[name]) / 2
            assert value == pytest.approx(mean, rel=1e-5), name
        assert found.selections == alone[0].selections
    assert alone[0].selections != alone[1].selections
