"""Triton kernels against the reference in fp64, on fresh random inputs.

`python -m tests.kernels.triton_cases SEED` runs all cases: on a GPU in bf16 and fp16, without one
in Triton's interpreter (TRITON_INTERPRET=1) in fp32, where rounding cannot hide a mistake.
"""

from __future__ import annotations

import random
import sys
from typing import NamedTuple

import torch
from hysparse_kernels import prepare_selection, reference, triton_attention
from torch import Tensor


class Case(NamedTuple):
    """Sizes of one comparison; see `reference` for the letters."""

    batch: int
    sequence: int
    heads: int
    groups: int
    head_dim: int
    value_dim: int
    block_size: int
    selected: int
    window: int


def draw(generator: random.Random, interpreted: bool) -> Case:
    """A random case: odd lengths, any heads per group, MQA, value dim unlike head dim."""
    groups = generator.choice([1, 2, 3])
    heads = groups * generator.choice([1, 2, 3, 4, 8, 16])
    dims = [16, 24, 32] if interpreted else [64, 96, 128, 192, 256]
    head_dim, value_dim = generator.choice(dims), generator.choice(dims)
    large = [32, 64] if max(head_dim, value_dim) > 128 else [32, 64, 128]
    block_size = generator.choice([16, 32] if interpreted else large)
    sequence = generator.randint(1, 40) if interpreted else generator.randint(1, 1500)
    return Case(
        generator.choice([1, 2]),
        sequence,
        heads,
        groups,
        head_dim,
        value_dim,
        block_size,
        generator.choice([1, 2, 3, 5]),
        generator.randint(1, sequence + 5),
    )


def compare(case: Case, dtype: torch.dtype, device: str, seed: int) -> None:
    """Assert outputs, selections and gradients of all three operations."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    query = 2 * normal(case.batch, case.sequence, case.heads, case.head_dim)
    key = normal(case.batch, case.sequence, case.groups, case.head_dim)
    value = normal(case.batch, case.sequence, case.groups, case.value_dim)
    sink = torch.randn(case.heads, generator=generator, device=device)
    grad = normal(case.batch, case.sequence, case.heads, case.value_dim)
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    block = {"block_size": case.block_size}
    picks = {**block, "num_selected": case.selected}

    exact = reference.oracle_attention(query.double(), key.double(), value.double(), **picks)
    got = triton_attention.oracle_attention(query, key, value, **picks)
    assert (got.lse.double() - exact.lse).abs().max() < 1e-4, f"{case}: lse"
    assert _same_up_to_ties(got.block_indices, exact, query, key, case), f"{case}: selection"
    lists = prepare_selection(exact.block_indices, case.heads, **block, backend="triton")

    operations = {
        "oracle": (
            lambda q, k, v, s: triton_attention.oracle_attention(q, k, v, **picks).output,
            lambda q, k, v, s: reference.oracle_attention(q, k, v, **picks).output,
        ),
        "block-sparse": (
            lambda q, k, v, s: triton_attention.block_sparse_attention(
                q, k, v, exact.block_indices, **block, sink=s, lists=lists
            ),
            lambda q, k, v, s: reference.block_sparse_attention(
                q, k, v, exact.block_indices, **block, sink=s
            ),
        ),
        "window": (
            lambda q, k, v, s: triton_attention.sliding_window_attention(
                q, k, v, window=case.window, sink=s
            ),
            lambda q, k, v, s: reference.sliding_window_attention(
                q, k, v, window=case.window, sink=s
            ),
        ),
    }
    for name, (ours, specification) in operations.items():
        low = [tensor.clone().requires_grad_() for tensor in (query, key, value, sink)]
        high = [tensor.double().requires_grad_() for tensor in (query, key, value, sink)]
        output, wanted = ours(*low), specification(*high)
        output.backward(grad)
        wanted.backward(grad.double())
        again = [tensor.detach().clone().requires_grad_() for tensor in low]
        repeated = ours(*again)
        repeated.backward(grad)
        assert torch.equal(output, repeated), f"{case}: {name} does not repeat"
        pairs = {"output": (output, wanted)}
        for letter, a, b, c in zip(("dq", "dk", "dv", "dsink"), low, high, again, strict=True):
            if b.grad is None:
                continue
            pairs[letter] = (a.grad, b.grad)
            if name != "oracle":  # whose backward is cuDNN's where that is there
                assert torch.equal(a.grad, c.grad), f"{case}: {letter} of {name} does not repeat"
        for what, (a, b) in pairs.items():
            error = (a.double() - b).norm() / b.norm().clamp(min=0.5 * b.numel() ** 0.5)
            assert error < tolerance, f"{case}: {what} of {name} is off by {error:.1e}"


def _same_up_to_ties(got: Tensor, exact, query: Tensor, key: Tensor, case: Case) -> bool:
    """Equal selections, except where the exact scores of what differs are within rounding."""
    if torch.equal(got, exact.block_indices):
        return True
    heads = case.heads // case.groups
    keys = key.double().repeat_interleave(heads, 2)
    logits = torch.einsum("bshd,bthd->bhst", query.double(), keys) * case.head_dim**-0.5
    later = torch.ones(case.sequence, case.sequence, device=query.device).triu(1).bool()
    scores = (logits - exact.lse[..., None]).masked_fill(later, -torch.inf)
    padding = -case.sequence % case.block_size
    scores = torch.nn.functional.pad(scores, (0, padding), value=-torch.inf)
    scores = scores.unflatten(3, (-1, case.block_size)).amax(4)
    scores = scores.unflatten(1, (case.groups, heads)).amax(2)

    def chosen(indices: Tensor) -> Tensor:
        found = scores.gather(3, indices.clamp(min=0).long())
        return found.masked_fill(indices < 0, -torch.inf).sort(-1).values

    a, b = chosen(got), chosen(exact.block_indices)
    return bool(((a == b) | ((a - b).abs() < 1e-4)).all())


def main(seed: int) -> None:
    """Run all cases for one seed."""
    generator = random.Random(seed)
    if torch.cuda.is_available():
        for _ in range(8):  # most of the time goes into compiling each
            dtype = generator.choice([torch.bfloat16, torch.float16])
            case = draw(generator, interpreted=False)
            compare(case, dtype, "cuda", generator.randrange(2**31))
            print(f"{case} agrees in {dtype}", flush=True)
    else:
        compare(Case(1, 1, 1, 1, 16, 16, 16, 1, 1), torch.float32, "cpu", seed)
        compare(Case(1, 39, 16, 1, 16, 32, 16, 2, 17), torch.float32, "cpu", seed)
        for _ in range(2):
            case = draw(generator, interpreted=True)
            compare(case, torch.float32, "cpu", generator.randrange(2**31))
    print("all cases agree")


if __name__ == "__main__":
    main(int(sys.argv[1]))
