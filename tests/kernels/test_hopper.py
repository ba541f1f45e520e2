"""What the Hopper kernels refuse, and that a refusal runs the portable ones."""

import dataclasses

import pytest
import torch
from hysparse_kernels import resolve_backend
from hysparse_kernels.call import SelectionRule
from hysparse_kernels.hopper import launch as hopper
from hysparse_kernels.query_range import QueryRange
from hysparse_kernels.triton import kernels as portable
from hysparse_kernels.triton.launch import KeySchedule
from hysparse_kernels.triton.topk import Selector


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


def test_the_log_says_whether_the_hopper_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    device = torch.device("cuda")
    for shape, said in (((16, 192, 128), "those for Hopper where"), ((3, 128, 128), "not 3")):
        choice = resolve_backend("auto", device, dtype=torch.bfloat16, hopper_shape=shape)
        assert choice.name == "triton"
        assert said in choice.reason
