"""What the Hopper kernels refuse, and how their programs share the work."""

import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch
from hysparse_kernels import resolve_backend
from hysparse_kernels.call import SelectionRule
from hysparse_kernels.hopper import common
from hysparse_kernels.hopper import launch as hopper
from hysparse_kernels.hopper.geometry import Geometry, descriptor
from hysparse_kernels.query_range import QueryRange
from hysparse_kernels.triton import kernels as portable
from hysparse_kernels.triton.launch import KeySchedule
from hysparse_kernels.triton.topk import Selector
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@pytest.mark.parametrize(
    ("heads", "width", "value_width", "reason"),
    [
        (3, 128, 128, "1, 2, 4, ... 64 heads per group, not 3"),
        (128, 128, 128, "heads per group, not 128"),
        (16, 96, 96, "not 96/96"),
        (16, 192, 64, "not 192/64"),
        (16, 256, 256, "not 256/256"),
    ],
)
def test_shapes_are_refused_with_a_reason(
    heads: int, width: int, value_width: int, reason: str
) -> None:
    assert reason in hopper.why_not_shape(heads, width, value_width)


@pytest.mark.parametrize("dims", [(64, 64), (64, 128), (128, 64), (128, 128), (192, 128)])
@pytest.mark.parametrize("heads", [1, 4, 16, 64])
def test_shapes_that_are_taken(heads: int, dims: tuple[int, int]) -> None:
    assert hopper.why_not_shape(heads, *dims) is None


def test_no_gpu_and_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.zeros(1, 8, 4, 64), torch.zeros(1, 8, 1, 64)
    schedule = KeySchedule(portable.WINDOW, keys=64, window=4)
    assert "compute capability 9.0" in hopper.why_not(query, key, key, schedule)
    monkeypatch.setenv(hopper.SWITCH, "0")
    assert hopper.why_not(query, key, key, schedule) == "HYSPARSE_HOPPER is 0"


def test_ranges_and_a_million_tokens_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    query, key = torch.zeros(1, 8, 4, 64), torch.zeros(1, 8, 1, 64)
    schedule = KeySchedule(portable.WINDOW, keys=64, window=4)
    assert hopper.why_not(query, key, key, schedule) is None
    schedule = dataclasses.replace(schedule, queries=QueryRange(0, 8, 9))
    assert hopper.why_not(query, key, key, schedule) is None
    selectors = [Selector(SelectionRule(64, 16), length, None) for length in (1_048_576, 1_048_640)]
    schedule = KeySchedule(portable.CAUSAL, keys=64)
    assert hopper.why_not(query, key, key, schedule, selectors[0]) is None
    reason = hopper.why_not(query, key, key, schedule, selectors[1])
    assert reason == "they rank up to 16384 blocks, not 16385"


@pytest.mark.parametrize(
    ("width", "first", "copied"), [(72, 0, False), (72, 8, False), (72, 1, True), (68, 0, True)]
)
def test_rows_that_do_not_start_at_16_bytes_are_copied(
    width: int, first: int, copied: bool
) -> None:
    rows = torch.randn(2, 8, 4, width).to(torch.bfloat16)[..., first : first + 64]
    found = hopper.aligned(rows)
    assert torch.equal(found, rows)
    assert (found.data_ptr() != rows.data_ptr()) == copied
    assert not copied or found.is_contiguous()


def test_descriptors_are_checked_and_named_as_the_compiler_names_them() -> None:
    rows = torch.zeros(2, 8, 4, 64, dtype=torch.bfloat16)
    box = (1, 4, 4, 64)
    found = descriptor(rows, box)
    layout = gl.NVMMASharedLayout.get_default_for(list(box), gl.bfloat16)
    expected = TensorDescriptor(rows, list(rows.shape), list(rows.stride()), list(box), layout)
    assert repr(found.layout) == repr(layout)
    for name in ("base", "shape", "strides", "block_shape", "padding"):
        assert getattr(found, name) is getattr(expected, name) or (
            getattr(found, name) == getattr(expected, name)
        )
    # A token's step of 68 numbers is no multiple of 16 bytes; of one token it is not taken.
    odd = torch.zeros(1, 8, 4, 17, dtype=torch.bfloat16)[..., :16]
    with pytest.raises(AssertionError, match="16-byte"):
        descriptor(odd, (1, 4, 4, 16))
    assert descriptor(odd[:, :1, :1], (1, 1, 1, 16)).strides == [64, 64, 64, 1]


def test_the_log_says_whether_the_hopper_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    device = torch.device("cuda")
    for shape, said in (((16, 192, 128), "those for Hopper where"), ((3, 128, 128), "not 3")):
        choice = resolve_backend("auto", device, dtype=torch.bfloat16, hopper_shape=shape)
        assert choice.name == "triton"
        assert said in choice.reason


PROGRAMS = 132


def shares(size: Geometry, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """The tile and group of every piece of work of every program, in the kernels' own order."""
    tiles = -(-size.sequence // (2 * size.tokens))
    items = tiles * size.batch * size.groups
    programs = min(items, PROGRAMS)
    together = size.together(tiles, programs)
    taken: list[list[tuple[int, int]]] = []
    for program in range(programs):
        language = SimpleNamespace(program_id=lambda _, program=program: program, minimum=min)
        monkeypatch.setattr(common, "gl", language)
        given = [
            common.work.fn(item, items, tiles, together, programs)
            for item in range(-(-items // programs))
        ]
        taken.append([(tile, group) for tile, group, valid in given if valid])
    return taken


def test_every_tile_of_every_group_is_taken_once(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = 2 ** rng.randrange(7)
    groups, batch = rng.randint(1, 12), rng.randint(1, 3)
    queries, keys = rng.randint(1, 3000), rng.randint(1, 3000)
    size = Geometry(batch, queries, keys, heads * groups, groups, 128, 128)
    taken = [piece for share in shares(size, monkeypatch) for piece in share]
    tiles = -(-size.sequence // (2 * size.tokens))
    assert sorted(taken) == [
        (tile, group) for tile in range(tiles) for group in range(batch * groups)
    ]


@pytest.mark.parametrize("heads", [4, 16])
@pytest.mark.parametrize(("length", "groups"), [(4096, 8), (8192, 4), (8192, 8), (32768, 4)])
def test_no_program_has_much_more_to_do_than_another(
    heads: int, length: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = Geometry(1, length, length, heads * groups, groups, 128, 128)
    work = [sum(tile + 1 for tile, _ in share) for share in shares(size, monkeypatch)]
    assert max(work) < 1.06 * sum(work) / len(work)
