"""Stages against all splits, and what crosses cuts against a recomputation layer by layer."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hysparse_megatron.architecture.layout import MAX_LAYERS, Layout, LayoutError, parse_layout
from hysparse_megatron.architecture.stages import (
    PipelinePlan,
    live_oracle,
    plan_pipeline,
    stage_layers,
)

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
@settings(max_examples=300)
def test_what_crosses_every_cut(case: tuple[PipelinePlan, str, list[int]]) -> None:
    plan, kinds, starts = case
    assert plan.oracle_into(0) is None
    assert plan.oracle_out_of(len(starts) - 1) is None
    for stage in range(1, len(starts)):
        wanted = carried(kinds, starts[stage])
        assert plan.oracle_into(stage) == wanted
        assert plan.oracle_out_of(stage - 1) == wanted


@given(plans())
@settings(max_examples=300)
def test_who_is_read(case: tuple[PipelinePlan, str, list[int]]) -> None:
    plan, kinds, _ = case
    read = {oracle_of(kinds, layer) for layer, kind in enumerate(kinds) if kind == "S"}
    assert [plan.is_read(layer) for layer in range(len(kinds))] == [
        layer in read for layer in range(len(kinds))
    ]


@given(plans())
@settings(max_examples=300)
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


def test_a_plan_of_a_layout() -> None:
    plan = plan_pipeline("F 3*S F | 3*S F", 2)
    assert plan.stages == (range(5), range(5, 9))
    assert plan.oracle_into(1) == 4
    assert plan.describe().splitlines()[1] == (
        "stage 1 (pp rank 1, chunk 0): layers 5-8 SSSF, reads on from oracle 4 across the cut"
    )
    plan = plan_pipeline("F 3*S F 3*S", 2, 2)
    assert (plan.pp, plan.num_chunks, len(plan.stages)) == (2, 2, 4)


def test_live_oracle() -> None:
    layout = parse_layout("F S S W F S W F F")
    live = [live_oracle(layout, index) for index in range(layout.num_layers + 1)]
    assert live == [None, 0, 0, None, None, 4, None, None, None, None]
    assert live_oracle(parse_layout("F W S"), 1) == 0


def all_splits(layout: Layout, num_stages: int) -> list[tuple[range, ...]]:
    splits = []
    for cuts in itertools.combinations(range(1, layout.num_layers), num_stages - 1):
        if set(layout.cuts) <= set(cuts):
            edges = (0, *cuts, layout.num_layers)
            splits.append(tuple(range(a, b) for a, b in itertools.pairwise(edges)))
    return splits


def balance(layout: Layout, costs: list[float], stages: tuple[range, ...]) -> tuple[float, int]:
    inside = sum(live_oracle(layout, stage.start) is not None for stage in stages[1:])
    return max(sum(costs[index] for index in stage) for stage in stages), inside


@pytest.mark.parametrize("trial", range(120))
def test_stages_are_the_best_of_all_splits(trial: int, rng: random.Random) -> None:
    text = "F" + "".join(rng.choice("FSSW") for _ in range(rng.randint(0, 9)))
    for _ in range(rng.randint(0, 2)):
        place = rng.randint(1, len(text))
        if place < len(text) and "|" not in text[place - 1 : place + 1]:
            text = f"{text[:place]}|{text[place:]}"
    layout = parse_layout(text)
    num_stages = rng.randint(len(layout.cuts) + 1, layout.num_layers)
    costs = [kind.relative_time for kind in layout.kinds]
    stages = stage_layers(layout, num_stages)
    splits = all_splits(layout, num_stages)
    assert stages in splits
    best = min(balance(layout, costs, split) for split in splits)
    assert balance(layout, costs, stages) == best


def test_equal_balance_prefers_the_border_of_a_block() -> None:
    # A cut before layer 2 or 3 costs the same at most; only the second is a border.
    assert stage_layers(parse_layout("F 2*S F S"), 2) == (range(3), range(3, 5))
    # Better balance wins over the border.
    assert stage_layers(parse_layout("F 3*S F S"), 2) == (range(3), range(3, 6))


def test_forced_cuts() -> None:
    layout = parse_layout("F 3*S F | 3*S F")
    assert stage_layers(layout, 2) == (range(5), range(5, 9))
    stages = stage_layers(layout, 4)
    assert 5 in [stage.start for stage in stages]
    assert len(stages) == 4
    with pytest.raises(LayoutError, match="1 cuts, but 1 pipeline stages") as caught:
        stage_layers(layout, 1)
    assert caught.value.position == layout.text.index("|")
    with pytest.raises(LayoutError, match="9 layers cannot fill 10"):
        stage_layers(layout, 10)


def test_stages_of_a_large_model_are_quick_and_balanced() -> None:
    layout = parse_layout("4*(F 11*S) F")
    stages = stage_layers(layout, 16)
    assert [index for stage in stages for index in stage] == list(range(49))
    assert len(stage_layers(parse_layout(f"{MAX_LAYERS}*F"), 64)) == 64
