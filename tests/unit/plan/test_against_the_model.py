"""The planner's parameters and bytes against models that megatron-core really builds.

The big ones are built on the meta device, at their true size, as one rank of a world that does not
exist: a fake process group answers for the others.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.layer_wise_optimizer import is_managed_by_layer_wise_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import Config
from hysparse_megatron.config.validate import validate
from hysparse_megatron.model.builder import build_chunks
from hysparse_megatron.model.megatron_config import HySparseConfig, make_megatron_config
from hysparse_megatron.plan.overview import Overview, make_overview
from hysparse_megatron.runtime import megatron_on_cpu
from hysparse_megatron.runtime.process_groups import build_process_groups, destroy_process_groups

pytestmark = pytest.mark.thorough

SIZES = ("7b", "80b_a3b")
FAMILIES = ("hysparse", "full", "hybrid_swa")
MODELS = [f"{family}_{size}" for family, size in itertools.product(FAMILIES, SIZES)]

DENSE_PLANS = [
    (1, []),
    (32, ["parallel.tp=4", "parallel.pp=4", "parallel.vpp=2"]),
    (
        32,
        [
            "parallel.tp=16",
            "parallel.pp=2",
            "parallel.sequence_parallel=true",
            "model.qkv_bias=true",
        ],
    ),
]
EXPERT_PLANS = [
    (512, ["parallel.ep=512"]),
    (512, ["parallel.tp=2", "parallel.pp=4", "parallel.ep=128"]),
    (
        512,
        ["parallel.tp=8", "parallel.pp=2", "parallel.vpp=2", "parallel.ep=128"],
    ),
]
CASES = [
    (name, world, overrides)
    for name in MODELS
    for world, overrides in (DENSE_PLANS if name.endswith("7b") else EXPERT_PLANS)
]


def configured(name: str, world_size: int, overrides: list[str]) -> Config:
    has_tp = any(item.startswith("parallel.tp=") for item in overrides)
    sequence = ["parallel.sequence_parallel=true"] if has_tp else []
    sizes = ["train.global_batch_size=1024", "train.micro_batch_size=1"]
    config = compose([f"model={name}", *overrides, *sequence, *sizes, "train.precision=bf16"])
    assert validate(config, world_size=world_size) == []
    return config


@contextmanager
def rank_of_a_world(config: Config, rank: int, size: int) -> Iterator[ProcessGroupCollection]:
    """The groups of one rank; nothing that is sent to the others arrives."""
    megatron_on_cpu.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    without_gloo = partial(
        parallel_state.initialize_model_parallel, create_gloo_process_groups=False
    )
    try:
        with mock.patch.object(parallel_state, "initialize_model_parallel", without_gloo):
            yield build_process_groups(config.parallel, config.model.num_query_groups)
    finally:
        destroy_process_groups()
        dist.destroy_process_group()


def built(config: Config, groups: ProcessGroupCollection) -> list[torch.nn.Module]:
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    with torch.device("meta"):
        return list(build_chunks(config, make_megatron_config(config), vocab_size, groups))


@pytest.mark.parametrize(
    ("name", "world_size", "overrides"), CASES, ids=lambda part: str(part).replace("parallel.", "")
)
def test_ranks_hold_what_the_planner_says(name: str, world_size: int, overrides: list[str]) -> None:
    config = configured(name, world_size, overrides)
    overview = make_overview(config, world_size)
    per_stage = world_size // config.parallel.pp
    # The first or the last rank of every pipeline stage.
    for stage in range(config.parallel.pp):
        member = 0 if stage % 2 == 0 else per_stage - 1
        with rank_of_a_world(config, stage * per_stage + member, world_size) as groups:
            assert groups.pp.rank() == stage
            chunks = built(config, groups)
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        assert {parameter.device.type for parameter in parameters} == {"meta"}
        experts = [p for p in parameters if not getattr(p, "allreduce", True)]
        held = overview.ranks[stage].parameters
        assert sum(p.numel() for p in experts) == held.experts
        assert sum(p.numel() for p in parameters) == held.total
        # What megatron-core gives to Muon.
        matrices = [
            list(filter(is_managed_by_layer_wise_optimizer, c.parameters())) for c in chunks
        ]
        dense = [[p.numel() for p in found if getattr(p, "allreduce", True)] for found in matrices]
        assert sum(map(sum, dense)) == held.matrices
        assert sum(map(max, dense)) == held.largest_matrix
        if experts:
            largest = max(p.numel() for p in experts)
            assert largest * len(chunks) == held.largest_expert_matrix


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_model_counts_what_the_planner_says(name: str) -> None:
    """One stage; with experts one per rank, so that 512 ranks hold all."""
    ep = 512 if name.endswith("80b_a3b") else 1
    config = configured(name, ep, [f"parallel.ep={ep}"])
    with rank_of_a_world(config, 0, ep) as groups:
        parameters = [p for chunk in built(config, groups) for p in chunk.parameters()]
    dense = sum(p.numel() for p in parameters if getattr(p, "allreduce", True))
    experts = sum(p.numel() for p in parameters if not getattr(p, "allreduce", True))
    counted = make_overview(config, ep).parameters
    assert dense + ep * experts == counted.total
    inactive = (ep - config.model.moe.num_active_experts) * experts if ep > 1 else 0
    assert counted.total - inactive == counted.active


SHARING = [
    ["parallel.pp=4"],
    ["parallel.pp=4", "parallel.vpp=2"],
    ["parallel.tp=4", "parallel.pp=2", "parallel.sequence_parallel=true"],
    ["parallel.tp=16", "parallel.pp=3", "parallel.sequence_parallel=true"],
    ["parallel.tp=4", "parallel.pp=2", "train.precision=bf16", "train.micro_batch_size=2"],
]


@pytest.mark.parametrize("overrides", SHARING, ids=" ".join)
def test_cuts_carry_what_the_model_packs(overrides: list[str]) -> None:
    inside = "model.layout=4*(F 5*S) F 8*S F 9*S F"
    config = compose(["model=hysparse_7b", inside, *overrides])
    megatron: HySparseConfig = make_megatron_config(config)
    overview: Overview = make_overview(config, config.parallel.tp * config.parallel.pp)
    assert any(stage.cut is not None and stage.cut.oracle is not None for stage in overview.stages)
    split = config.parallel.tp if config.parallel.sequence_parallel else 1
    rows = config.train.seq_length // split * config.train.micro_batch_size
    for index, stage in enumerate(overview.stages):
        if index == 0:
            assert stage.cut is None
            continue
        assert stage.cut is not None
        sent = rows * megatron.payload_width(index) * megatron.pipeline_dtype.itemsize
        assert stage.cut.total_bytes == sent
