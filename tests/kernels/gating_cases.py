"""The gated sum on Triton against its reference in fp64.

`python -m tests.kernels.gating_cases SEED`: on a GPU in bf16 and fp16, without one in Triton's
interpreter (TRITON_INTERPRET=1) in fp32.
"""

import random
import sys

import torch
from hysparse_kernels.gating import reference_gated_sum
from hysparse_kernels.triton import gating
from torch import Tensor

from tests.kernels.rounding import FUNCTION, Unit, assert_within


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
    output = gating.gated_sum(*branches, *(gate.transpose(0, 1) for gate in gates))
    wanted = reference_gated_sum(high[0], high[1], *(gate.transpose(0, 1) for gate in high[2:]))
    output.backward(grad)
    wanted.backward(grad.double())
    pairs = [(output, wanted)]
    pairs += [(low.grad, h.grad) for low, h in zip((*branches, *gates), high, strict=True)]
    names = ("output", "d first", "d second", "d first gate", "d second gate")
    for name, (got, want), allowed in zip(names, pairs, variances(high, grad), strict=True):
        assert_within(got, want, allowed, f"{name} of {shape}, gates of width {width}, {dtype}")


def variances(high: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Of output and gradients, given branches and gates in fp64 with the dtype of `grad`."""
    first, second, first_gate, second_gate = (tensor.detach() for tensor in high)
    unit, grad = Unit.of(grad.dtype), grad.double()
    of_output, found = torch.zeros_like(first), []
    for branch, gate in ((first, first_gate), (second, second_gate)):
        share = gate.sigmoid().transpose(0, 1)
        of_output += FUNCTION * (unit.summed * share * branch) ** 2
        found.append(unit.store(share * grad, FUNCTION * (unit.summed * share * grad) ** 2))
    for branch, gate in ((first, first_gate), (second, second_gate)):
        share, terms = gate.sigmoid(), (branch * grad).abs().transpose(0, 1)
        count = terms.shape[-1] if gate.shape[-1] == 1 else 1
        pulled = (branch * grad).transpose(0, 1)
        if count > 1:
            terms, pulled = terms.sum(-1, keepdim=True), pulled.sum(-1, keepdim=True)
        # Of the sum, and of 1 - share, which is off by as much as 1 is.
        error = (unit.summed * share * terms) ** 2 * (count + FUNCTION)
        found.append(unit.store(pulled * share * (1 - share), error))
    total = first_gate.sigmoid().transpose(0, 1) * first
    total += second_gate.sigmoid().transpose(0, 1) * second
    return [unit.store(total, of_output), *found]


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
