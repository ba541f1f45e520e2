"""The pipeline plan against a recomputation that follows every layer one by one."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from hysparse_megatron.config.compose import compose
from hysparse_megatron.layout import parse_layout
from hysparse_megatron.plan.topology import PipelinePlan, plan_pipeline

# (layers after the first, cut before each of them, pp)
LAYERS = st.lists(st.tuples(st.sampled_from("FSW"), st.booleans()), max_size=12)


@st.composite
def plans(draw: st.DrawFn) -> tuple[PipelinePlan, str, list[int]]:
    """A plan with arbitrary stages; its letters; the first layer of every stage."""
    rest = draw(LAYERS)
    kinds = "F" + "".join(kind for kind, _ in rest)
    starts = [0, *(index for index, (_, cut) in enumerate(rest, 1) if cut)]
    edges = [*starts, len(kinds)]
    stages = tuple(range(a, b) for a, b in itertools.pairwise(edges))
    divisors = [size for size in range(1, len(stages) + 1) if len(stages) % size == 0]
    return PipelinePlan(parse_layout(kinds), stages, draw(st.sampled_from(divisors))), kinds, starts


def oracle_of(kinds: str, layer: int) -> int:
    return kinds.rindex("F", 0, layer)


def carried(kinds: str, cut: int) -> int | None:
    """The oracle before `cut` that a sparse layer at or after it reads, found by asking all."""
    readers = [layer for layer in range(cut, len(kinds)) if kinds[layer] == "S"]
    oracles = {oracle_of(kinds, layer) for layer in readers}
    before = {oracle for oracle in oracles if oracle < cut}
    assert len(before) <= 1
    return before.pop() if before else None


@given(plans())
@settings(deadline=None, max_examples=300)
def test_what_crosses_every_cut(case: tuple[PipelinePlan, str, list[int]]) -> None:
    plan, kinds, starts = case
    assert plan.oracle_into(0) is None
    assert plan.oracle_out_of(len(starts) - 1) is None
    for stage in range(1, len(starts)):
        wanted = carried(kinds, starts[stage])
        assert plan.oracle_into(stage) == wanted
        assert plan.oracle_out_of(stage - 1) == wanted


@given(plans())
@settings(deadline=None, max_examples=300)
def test_who_is_read(case: tuple[PipelinePlan, str, list[int]]) -> None:
    plan, kinds, _ = case
    read = {oracle_of(kinds, layer) for layer, kind in enumerate(kinds) if kind == "S"}
    assert [plan.is_read(layer) for layer in range(len(kinds))] == [
        layer in read for layer in range(len(kinds))
    ]


@given(plans())
@settings(deadline=None, max_examples=300)
def test_pattern_places_and_description(case: tuple[PipelinePlan, str, list[int]]) -> None:
    plan, kinds, starts = case
    marked = "".join(("|" if i in starts[1:] else "") + "*" for i in range(len(kinds)))
    assert plan.megatron_pattern == marked
    assert plan.num_chunks * plan.pp == len(starts)
    places = [(rank, chunk) for chunk in range(plan.num_chunks) for rank in range(plan.pp)]
    assert [plan.stage_index(*place) for place in places] == list(range(len(starts)))
    lines = plan.describe().splitlines()
    assert len(lines) == len(starts)
    ends = [*starts[1:], len(kinds)]
    for line, start, end, (rank, chunk) in zip(lines, starts, ends, places, strict=True):
        assert line.startswith(f"stage {starts.index(start)} (pp rank {rank}, chunk {chunk}): ")
        assert f"layers {start}-{end - 1} {kinds[start:end]}" in line
        oracle = carried(kinds, start) if start else None
        assert line.endswith(f"oracle {oracle} across the cut") == (oracle is not None)


def test_a_plan_from_a_configuration() -> None:
    config = compose(["model.layout=F 3*S F | 3*S F", "parallel.pp=2"])
    plan = plan_pipeline(config.model, config.parallel)
    assert plan.stages == (range(5), range(5, 9))
    assert plan.oracle_into(1) == 4
    assert plan.describe().splitlines()[1] == (
        "stage 1 (pp rank 1, chunk 0): layers 5-8 SSSF, reads on from oracle 4 across the cut"
    )
    config = compose(["model.layout=F 3*S F 3*S", "parallel.pp=2", "parallel.vpp=2"])
    plan = plan_pipeline(config.model, config.parallel)
    assert (plan.pp, plan.num_chunks, len(plan.stages)) == (2, 2, 4)
