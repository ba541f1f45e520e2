"""Small cases of every kernel, to be run under compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 9 python -m tests.gpu.sanitized SEED

synccheck too; racecheck with HYSPARSE_HOPPER=0, as it does not follow the memory barriers by which
the warps of the Hopper kernels hand data over, and complains of cuDNN's too. None of those runs.
"""

import random
import sys

import torch

from tests.kernels.drawn_cases import Case
from tests.kernels.triton_cases import compare, compare_lists, several_passes

CASES = (
    Case(16, 1, 128, 128, 64, 2, 70, 2, 203),
    Case(8, 2, 192, 128, 64, 3, 33, 1, 150, (41, 0, 109)),
    Case(6, 2, 96, 64, 32, 2, 40, 1, 131, (70, 61)),
)
"""Hopper kernels dense and packed, and the portable ones."""


def main(seed: int) -> None:
    """All cases, with lists cut into pieces and passes as those of long sequences are."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    generator = random.Random(seed)
    for case in CASES:
        with several_passes(64, 2**12, 2**20):
            compare_lists(case, "cuda", generator.randrange(2**31))
            compare(case, torch.bfloat16, "cuda", generator.randrange(2**31))
        print(f"{case} agrees", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
