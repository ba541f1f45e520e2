"""What the Hopper kernels refuse, and that a refusal runs the portable ones."""

import pytest
import torch
from hysparse_kernels import hopper, triton_kernels
from hysparse_kernels.triton_launch import Walk


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
    walk = Walk(triton_kernels.WINDOW, keys=64, window=4)
    assert "compute capability 9.0" in hopper.why_not(query, key, key, walk)
    monkeypatch.setenv(hopper.SWITCH, "0")
    assert hopper.why_not(query, key, key, walk) == "HYSPARSE_HOPPER is 0"


def test_rows_must_start_at_16_bytes() -> None:
    whole = torch.zeros(1, 8, 4, 72, dtype=torch.bfloat16)
    assert hopper._aligned(whole[..., :64])
    assert not hopper._aligned(whole[..., 1:65])
    assert not hopper._aligned(torch.zeros(1, 8, 4, 68, dtype=torch.bfloat16)[..., :64])
