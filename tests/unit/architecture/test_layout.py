"""The layout language."""

import pytest

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.layout import MAX_LAYERS, LayerPlan, LayoutError, parse_layout
from hysparse_megatron.errors import ConfigError


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
    assert layout.letters == expected
    assert layout.cuts == cuts
    assert all(text[position] == "|" for position in layout.cut_positions)


def test_presets_of_the_paper() -> None:
    dense, sparse = parse_layout("8*(F 3*S) F 2*S F"), parse_layout("4*(F 11*S) F")
    full = [i for i, kind in enumerate(sparse.kinds) if kind is LayerKind.FULL]
    assert dense.num_layers == 36
    assert dense.letters.count("F") == 10
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
