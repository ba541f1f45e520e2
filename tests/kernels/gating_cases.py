"""The gated sum on Triton against its reference in fp64.

`python -m tests.kernels.gating_cases SEED`: on a GPU in bf16 and fp16, without one in Triton's
interpreter (TRITON_INTERPRET=1) in fp32.
"""

from __future__ import annotations

import random
import sys

import torch
from hysparse_kernels import triton_gating
from hysparse_kernels.gating import reference_gated_sum


def compare(rng: random.Random, dtype: torch.dtype, device: str) -> None:
    """One random shape, gates per head or per channel, output and all gradients."""
    shape = (
        rng.randint(1, 2),
        rng.randint(1, 90),
        rng.choice([1, 3, 8]),
        rng.choice([16, 24, 128]),
    )
    width = rng.choice([1, shape[-1]])
    branches = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2)]
    # Sequence first, as the projections of a Megatron layer give them.
    gates = [
        torch.randn(shape[1], shape[0], shape[2], width, device=device).to(dtype).requires_grad_()
        for _ in range(2)
    ]
    high = [tensor.detach().double().requires_grad_() for tensor in (*branches, *gates)]
    grad = torch.randn(shape, device=device).to(dtype)
    output = triton_gating.gated_sum(*branches, *(gate.transpose(0, 1) for gate in gates))
    wanted = reference_gated_sum(high[0], high[1], *(gate.transpose(0, 1) for gate in high[2:]))
    output.backward(grad)
    wanted.backward(grad.double())
    tolerance = 1e-6 if dtype is torch.float32 else 5e-3
    pairs = [(output, wanted)]
    pairs += [(low.grad, h.grad) for low, h in zip((*branches, *gates), high, strict=True)]
    for got, want in pairs:
        error = (got.double() - want).norm() / want.norm()
        assert error < tolerance, f"{shape}, gates of width {width}, {dtype}: off by {error:.1e}"


def main(seed: int) -> None:
    """A few random shapes for one seed."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    gpu = torch.cuda.is_available()
    for _ in range(8):
        dtype = rng.choice([torch.bfloat16, torch.float16]) if gpu else torch.float32
        compare(rng, dtype, "cuda" if gpu else "cpu")
    print("all cases agree")


if __name__ == "__main__":
    main(int(sys.argv[1]))
