"""Prompts in chunks on a GPU against one piece in fp64: every type and kind of cache, no waits."""

import random

import pytest
import torch
from hysparse_kernels import FP8, Chunk
from hysparse_kernels.hopper import launch as hopper

from tests.kernels import prefill_cases
from tests.kernels.prefill_cases import Case, Prompts

pytestmark = pytest.mark.usefixtures("seed")
GPU = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_prompts(dtype: torch.dtype, rng: random.Random) -> None:
    for _ in range(3):  # most of the time goes into compiling each
        case = prefill_cases.draw(rng, dtype, on_gpu=True)
        prefill_cases.compare(case, GPU, rng.randrange(2**31))


@pytest.mark.parametrize("full_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("dims", [(192, 128), (128, 128)])
def test_paper_sizes(dims: tuple[int, int], full_dtype: torch.dtype, rng: random.Random) -> None:
    """Those that the Hopper kernels take; prompts of other lengths than whole blocks."""
    case = Case(64, 4, *dims, 64, 4, 128, (1403, 200, 701), 512, torch.bfloat16, full_dtype)
    prefill_cases.compare(case, GPU, rng.randrange(2**31))


@pytest.mark.parametrize("full_dtype", [torch.bfloat16, FP8])
def test_nothing_waits_for_the_device(full_dtype: torch.dtype) -> None:
    """So that the host is ahead of the kernels through all layers of a chunk."""
    case = Case(16, 2, 128, 128, 64, 2, 128, (384, 200), 128, torch.bfloat16, full_dtype)
    prompts = Prompts(case, GPU, 0)
    steps = list(case.steps(GPU))

    def run(chunk: Chunk) -> None:
        _, selection = prompts.full(chunk)
        prompts.sparse(chunk, selection)
        prompts.window(chunk)

    for chunk in steps:  # compiles
        run(chunk)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for chunk in steps:
            run(chunk)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_fast_kernels_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reason to fall back would leave the tests above on the portable kernels unseen."""
    if not hopper.is_hopper(GPU):
        pytest.skip("needs a Hopper GPU")
    calls = []
    real = hopper.forward
    monkeypatch.setattr(hopper, "forward", lambda *given: calls.append(0) or real(*given))
    case = Case(64, 4, 192, 128, 64, 2, 128, (300,), 128, torch.bfloat16, torch.bfloat16)
    prompts = Prompts(case, GPU, 0)
    for number, chunk in enumerate(case.steps(GPU), 1):
        _, selection = prompts.full(chunk)
        prompts.sparse(chunk, selection)  # a branch of blocks and one of the window
        assert len(calls) == 3 * number
