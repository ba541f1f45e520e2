"""The cut of a projection into parts; its order and ranks are the parity table's."""

import random

import pytest
import torch

from hysparse_megatron.model.projection import CompiledCut
from tests.unit.single_process import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_compiled_cut_is_the_plain_one(
    groups: int, dtype: torch.dtype, rng: random.Random, seed: int
) -> None:
    """To the bit, as it computes nothing."""
    widths = [rng.choice([1, 3, 16, 128]) for _ in range(rng.randint(2, 5))]
    shape = (rng.randint(1, 9), rng.randint(1, 3), groups, sum(widths))
    fused = torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)
    plain, found = fused.split(widths, dim=-1), CompiledCut.apply(fused, *widths)
    grads = [torch.randn_like(piece) for piece in plain]
    # What no layer reads has no gradient.
    used = sorted(rng.sample(range(len(widths)), rng.randint(1, len(widths))))
    expected, got = (
        torch.autograd.grad([pieces[i] for i in used], fused, [grads[i] for i in used])[0]
        for pieces in (plain, found)
    )
    assert torch.equal(got, expected)
    assert got.dtype is dtype
    for piece, wanted in zip(found, plain, strict=True):
        assert torch.equal(piece, wanted)
        assert piece.is_contiguous()


def test_parts_keep_no_others_alive(seed: int) -> None:
    fused = torch.randn(4, 2, 3, 24, device=DEVICE)
    storages = {
        piece.untyped_storage().data_ptr(): piece.untyped_storage().nbytes()
        for piece in CompiledCut.apply(fused, 16, 7, 1)
    }
    assert sorted(storages.values()) == [24 * width * 4 for width in (1, 7, 16)]
    assert fused.untyped_storage().data_ptr() not in storages
