"""The layout language, the splitting into pipeline stages, and what crosses a cut."""

import itertools
import random

import pytest

from hysparse_megatron.errors import ConfigError
from hysparse_megatron.layout import (
    DEFAULT_COSTS,
    MAX_LAYERS,
    LayerKind,
    LayerPlan,
    Layout,
    LayoutError,
    live_oracle,
    parse_layout,
    stage_layers,
)


def letters(layout: Layout) -> str:
    return "".join(plan.kind.value for plan in layout.layers)


@pytest.mark.parametrize(
    ("text", "expected", "cuts"),
    [
        ("F", "F", ()),
        (" F 3*S F ", "FSSSF", ()),
        ("2*(F 3*S) F", "FSSSFSSSF", ()),
        ("2*(F 2*(S W))F", "FSWSWFSWSWF", ()),
        ("9*F", "F" * 9, ()),
        ("2 * ( F\n\t3 * S )", "FSSSFSSS", ()),
        ("F 3*S F | 3*S F", "FSSSFSSSF", (5,)),
        ("2*(F S | S) F", "FSSFSSF", (2, 5)),
        ("F 2*(| S) | W", "FSSW", (1, 2, 3)),
        ("W W F S", "WWFS", ()),
        ("((F))", "F", ()),
    ],
)
def test_good_layouts(text: str, expected: str, cuts: tuple[int, ...]) -> None:
    layout = parse_layout(text)
    assert letters(layout) == expected
    assert layout.cuts == cuts
    assert all(text[position] == "|" for position in layout.cut_positions)


def test_presets_of_the_paper() -> None:
    dense, sparse = parse_layout("8*(F 3*S) F 2*S F"), parse_layout("4*(F 11*S) F")
    full = [i for i, plan in enumerate(sparse.layers) if plan.kind is LayerKind.FULL]
    assert dense.num_layers == 36
    assert letters(dense).count("F") == 10
    assert sparse.num_layers == 49
    assert full == [0, 12, 24, 36, 48]


def test_a_sparse_layer_reads_the_nearest_full_layer_before_it() -> None:
    layout = parse_layout("F S W S F S")
    assert [plan.oracle for plan in layout.layers] == [None, 0, None, 0, None, 4]
    assert layout.layers[3] == LayerPlan(LayerKind.SPARSE, 0)


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("", 0, "empty layout"),
        ("   ", 0, "empty layout"),
        ("3*S F", 2, "before any full layer"),
        ("W S", 2, "before any full layer"),
        ("F f", 2, "unknown layer 'f'"),
        ("F,S", 1, "unknown layer ','"),
        ("F \u0663*S", 2, "unknown layer"),
        ("2*(F 3*S", 2, "never closed"),
        ("F (S (S)", 2, "never closed"),
        ("F S)", 3, "never opened"),
        ("F ()", 3, "empty parentheses"),
        ("F 0*S", 2, "repeat of zero"),
        ("F *S", 2, "no count"),
        ("F 3S", 3, "no '*' after the count 3"),
        ("F 3", 2, "no '*' after the count 3"),
        ("F 3*", 3, "nothing to repeat"),
        ("F (3*)", 5, "nothing to repeat"),
        ("F 2*3*S", 4, "nothing to repeat"),
        (f"F {MAX_LAYERS + 1}*S", 2, "repeat too large"),
        ("F 999999999999*S", 2, "repeat too large"),
        ("F 2*(99*(99*S))", 5, "repeat too large"),
        ("|F", 0, "before the first layer"),
        ("F S|", 3, "after the last layer"),
        ("2*(F S|)", 6, "after the last layer"),
        ("F||S", 2, "two cuts"),
        ("2*(F|)|S", 6, "two cuts"),
    ],
)
def test_bad_layouts_point_at_the_character(text: str, position: int, message: str) -> None:
    with pytest.raises(LayoutError, match=r"layer|cut|repeat|parenthes|count") as caught:
        parse_layout(text)
    assert isinstance(caught.value, ConfigError)
    assert caught.value.exit_code == 2
    first, shown, caret = str(caught.value).split("\n")
    assert message in first
    assert caught.value.position == position
    assert caret.index("^") - 2 == position
    assert shown[2:] == text


def test_deep_nesting_is_no_crash() -> None:
    assert parse_layout("(" * 5000 + "F" + ")" * 5000).num_layers == 1


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
    costs: list[float] = [rng.choice([0.0, 0.5, 1.0, 2.0, 3.0]) for _ in layout.layers]
    stages = stage_layers(layout, num_stages, costs)
    splits = all_splits(layout, num_stages)
    assert stages in splits
    best = min(balance(layout, costs, split) for split in splits)
    assert balance(layout, costs, stages) == best
    default = stage_layers(layout, num_stages)
    weights = [DEFAULT_COSTS[plan.kind] for plan in layout.layers]
    best = min(balance(layout, weights, split) for split in splits)
    assert balance(layout, weights, default) == best


def test_equal_balance_prefers_the_border_of_a_block() -> None:
    # 4 + 2 or 2 + 4 layers cost the same at most; only a cut before index 4 is a border.
    layout = parse_layout("F 3*S F S")
    stages = stage_layers(layout, 2, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert stages == (range(3), range(3, 6))  # better balance wins over the border
    stages = stage_layers(layout, 2, [1.0, 1.0, 2.0, 0.0, 2.0, 0.0])
    assert stages == (range(4), range(4, 6))


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


@pytest.mark.parametrize("costs", [[1.0], [1.0, -1.0], [1.0, float("nan")]])
def test_bad_costs_are_refused(costs: list[float]) -> None:
    with pytest.raises(ValueError, match="costs"):
        stage_layers(parse_layout("F S"), 2, costs)
