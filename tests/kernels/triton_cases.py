"""Triton kernels against the reference in fp64, on fresh random inputs.

`python -m tests.kernels.triton_cases SEED` runs all cases: on a GPU in bf16 and fp16, without one
in Triton's interpreter (TRITON_INTERPRET=1) in fp32, where rounding cannot hide a mistake.
"""

import contextlib
import functools
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from hysparse_kernels import (
    KeyValueGradients,
    OracleOutput,
    block_lists,
    block_sparse_attention,
    block_topk,
    oracle_attention,
    prepare_selection,
    sliding_window_attention,
)
from hysparse_kernels.build_lists import build_block_lists
from hysparse_kernels.triton import lists as triton_lists
from hysparse_kernels.triton import topk as triton_topk
from torch import Tensor

from tests.kernels import rounding
from tests.kernels.cases import blocks_of, causal_keys, offsets, selected_keys, window_keys
from tests.kernels.drawn_cases import Case, Inputs, draw, poisoned_memory
from tests.kernels.rounding import Variances, assert_within

TRITON, REFERENCE = {"backend": "triton"}, {"backend": "reference"}


def compare(case: Case, dtype: torch.dtype, device: str, seed: int, sharpness: float = 2) -> None:
    """Assert outputs, selections and gradients of all three operations.

    Queries are `sharpness` times as large as keys: at 30 few keys of a row have any weight.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    queries = case.queries
    length = queries.stop - queries.start
    query = sharpness * normal(case.batch, length, case.heads, case.head_dim)
    key = normal(case.batch, case.sequence, case.groups, case.head_dim)
    value = normal(case.batch, case.sequence, case.groups, case.value_dim)
    sink = torch.randn(case.heads, generator=generator, device=device)
    grad = normal(case.batch, length, case.heads, case.value_dim)
    inputs = Inputs(query, key, value, sink, grad)
    packing = {"cu_seqlens": case.cu_seqlens(device), "query_start": case.first}
    block = {"block_size": case.block_size, **packing}
    rule = {**block, "num_selected": case.selected}
    seen = []

    def record(scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return scores

    exact = oracle_attention(query.double(), key.double(), value.double(), **rule, **REFERENCE)
    starts = case.starts(device)
    keys = causal_keys(starts, queries)
    allowed = rounding.attention(query, key, value, keys, dtype=dtype)
    block_of = blocks_of(starts, case.block_size)
    scores = rounding.block_scores(query, key, exact.lse, keys, block_of)

    def check(got: OracleOutput, how: str) -> None:
        assert_within(got.lse, exact.lse, allowed.lse, f"lse {how} of {case}")
        wrong = rounding.wrong_rows(got.block_indices, scores, allowed.scores)
        assert not wrong.any(), f"{case}: {int(wrong.sum())} rows of a selection {how}"

    check(oracle_attention(query, key, value, reduce_scores=record, **rule, **TRITON), "")
    scored = torch.cat(seen, 2)
    blocks = -(-queries.stop // case.block_size)
    assert scored.numel() == case.batch * case.groups * length * blocks
    assert not scored.isnan().any(), f"{case}: scores"
    # Without a look at the scores; on a Hopper GPU other kernels do that.
    with poisoned_memory():
        got = oracle_attention(query, key, value, **rule, **TRITON)
    check(got, "without scores")

    indices = disturbed(exact.block_indices, generator)
    lists = prepare_selection(
        indices, case.heads, **block, key_length=case.sequence, backend="triton"
    )
    operations = {
        "oracle": (
            lambda q, k, v, s: oracle_attention(q, k, v, **rule, **TRITON).output,
            lambda q, k, v, s: oracle_attention(q, k, v, **rule, **REFERENCE).output,
        ),
        "block-sparse": (
            lambda q, k, v, s: block_sparse_attention(
                q, k, v, indices, **block, sink=s, lists=lists, **TRITON
            ),
            lambda q, k, v, s: block_sparse_attention(
                q, k, v, indices, **block, sink=s, **REFERENCE
            ),
        ),
        "window": (
            lambda q, k, v, s: sliding_window_attention(
                q, k, v, window=case.window, sink=s, **packing, **TRITON
            ),
            lambda q, k, v, s: sliding_window_attention(
                q, k, v, window=case.window, sink=s, **packing, **REFERENCE
            ),
        ),
        "accumulated": (
            lambda q, k, v, s: accumulated(TRITON, q, k, v, s, indices, block),
            lambda q, k, v, s: accumulated(REFERENCE, q, k, v, s, indices, block),
        ),
    }
    bounds = rounding_of_operations(inputs, starts, indices, case)
    for name, (ours, specification) in operations.items():
        compare_operation(
            f"{name} of {case}",
            ours,
            specification,
            inputs,
            bounds[name],
            # The dense backward is cuDNN's where that is there.
            repeats=name in ("block-sparse", "window"),
        )


def rounding_of_operations(
    inputs: Inputs, starts: Tensor, indices: Tensor, case: Case
) -> dict[str, Variances]:
    """Variances of the results of all operations in `compare`."""
    query, key, value, sink, grad = inputs

    def of(query: Tensor, seen: Tensor, sink: Tensor | None = None) -> Variances:
        return rounding.attention(query, key, value, seen, dtype=query.dtype, sink=sink, grad=grad)

    selected = selected_keys(starts, indices, case.block_size, case.queries)
    found = {
        "oracle": of(query, causal_keys(starts, case.queries)),
        "block-sparse": of(query, selected, sink),
        "window": of(query, window_keys(starts, case.window, case.queries), sink),
    }
    twice = of(2 * query, selected)
    twice.query = 4 * twice.query  # of 2 * query with respect to query
    found["accumulated"] = rounding.added((found["block-sparse"], twice, found["oracle"]))
    return found


def accumulated(
    backend: dict[str, str], query: Tensor, key: Tensor, value: Tensor, sink: Tensor,
    indices: Tensor, block: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Two sparse layers and a dense one on the same key and value, with one fp32 sum.

    The second layer's backward comes first and writes the sum, those of the others add.
    """
    gradients = KeyValueGradients()
    key, value = gradients.attach(key, value)
    arguments = {**block, **backend, "accumulate": gradients}
    one = block_sparse_attention(query, key, value, indices, **arguments, sink=sink)
    nothing_selected: dict[str, Any] = {"select": False, "num_selected": 1}
    # A block size that no kernel takes: it plays no part where nothing is selected.
    dense = oracle_attention(
        query, key, value, **arguments | {"block_size": 48}, **nothing_selected
    )
    two = block_sparse_attention(2 * query, key, value, indices, **arguments)
    return one - two + dense.output


def compare_operation(
    what: str,
    ours: Callable[..., Tensor],
    specification: Callable[..., Tensor],
    inputs: Inputs,
    allowed: Variances,
    repeats: bool,
) -> None:
    """Assert output and gradients, with nothing unwritten read, and that on a GPU the output and,
    with `repeats`, the gradients come out the same once more: the interpreter has one order."""
    low, high = inputs.leaves(), inputs.leaves(torch.float64)
    wanted = specification(*high)
    wanted.backward(inputs.grad.double())
    with poisoned_memory():
        output = ours(*low)
        output.backward(inputs.grad)
    assert_within(output, wanted, allowed.output, f"output of {what}")
    names = ("dq", "dk", "dv", "dsink")
    for letter, a, b, variance in zip(names, low, high, allowed.numbers[1:], strict=True):
        if b.grad is not None:
            assert variance is not None
            assert_within(a.grad, b.grad, variance, f"{letter} of {what}")
    if not output.is_cuda:
        return
    again = inputs.leaves()
    repeated = ours(*again)
    repeated.backward(inputs.grad)
    assert torch.equal(output, repeated), f"{what} does not repeat"
    for letter, a, b in zip(names, low, again, strict=True):
        if repeats and a.grad is not None:
            assert torch.equal(a.grad, b.grad), f"{letter} of {what} does not repeat"


def disturbed(indices: Tensor, generator: torch.Generator) -> Tensor:
    """The blocks in any order, some random and thus twice or of the future, some rows empty, and
    block 0 in most rows."""
    shape, device = indices.shape, indices.device

    def chance(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, device=device)

    order = chance(*shape).argsort(-1)
    indices = indices.gather(-1, order)
    other = (chance(*shape) * (indices.max() + 1)).int()
    indices = torch.where(chance(*shape) < 0.1, other, indices)
    indices[..., 0] = torch.where(chance(*shape[:-1]) < 0.7, 0, indices[..., 0])
    return torch.where(chance(*shape[:-1], 1) < 0.1, -1, indices).contiguous()


def compare_leak(dtype: torch.dtype, device: str, seed: int) -> None:
    """Assert that another first document changes no bit of the second, in one tile with it."""
    generator = torch.Generator(device=device).manual_seed(seed)
    border, length = 21, 37

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    query, key, value = (normal(1, length, heads, 32) for heads in (4, 1, 1))
    packing = {"cu_seqlens": offsets([border, length - border]).to(device)}
    block = {"block_size": 16, **packing}
    results = []
    for _ in range(2):
        inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        oracle = oracle_attention(*inputs, **block, num_selected=1, **TRITON)
        indices = oracle.block_indices
        sparse = block_sparse_attention(*inputs, indices, **block, **TRITON)
        window = sliding_window_attention(*inputs, window=9, **packing, **TRITON)
        outputs = torch.cat([oracle.output, sparse, window], dim=3)
        outputs.sum().backward()
        gradients = [tensor.grad for tensor in inputs]
        results.append([outputs, indices.transpose(1, 2), oracle.lse.transpose(1, 2), *gradients])
        for tensor in (query, key, value):
            tensor[:, :border] = 3 * normal(*tensor[:, :border].shape)
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[:, border:], after[:, border:])
    assert not torch.equal(results[0][0][:, :border], results[1][0][:, :border])


def compare_lists(case: Case, device: str, seed: int) -> None:
    """Assert that Triton builds the lists that plain torch builds."""
    generator = torch.Generator(device=device).manual_seed(seed)
    blocks = -(-case.sequence // case.block_size)
    length = case.queries.stop - case.queries.start
    shape = (case.batch, case.groups, length, case.selected)
    indices = torch.randint(-1, blocks, shape, generator=generator, device=device).int()
    arguments = (
        indices, case.heads // case.groups, case.block_size, case.cu_seqlens(device), case.range,
    )  # fmt: skip
    with poisoned_memory():
        lists = build_block_lists(*arguments)
    wanted = build_block_lists(*arguments, with_triton=False)
    for field in ("starts", "bits", "counts"):
        a, b = getattr(lists, field), getattr(wanted, field)
        assert a.dtype == b.dtype, field
        assert torch.equal(a, b), f"{case}: {field} of the lists"
    for a, b in zip(lists.work_items.tensors, wanted.work_items.tensors, strict=True):
        assert torch.equal(a, b), f"{case}: work_items of the lists"
    readers = int(wanted.work_items.stop.max())
    assert torch.equal(lists.inverse_part[:readers], wanted.inverse_part[:readers]), case
    assert torch.equal(lists.inverse_bits[:readers], wanted.inverse_bits[:readers]), case
    assert lists.segments == wanted.segments


def compare_topk(device: str, seed: int, shapes: list[tuple[int, int]]) -> None:
    """Assert the exact top-k of (N, K), with many ties and infinities, in every dtype."""
    generator = torch.Generator(device=device).manual_seed(seed)
    for blocks, selected in shapes:
        scores = torch.randn(3, 2, blocks, generator=generator, device=device)
        scores[1] = scores[1].round()
        level = torch.rand(3, 2, blocks, generator=generator, device=device)
        scores = scores.masked_fill(level < 0.1, -torch.inf).masked_fill(level > 0.99, torch.inf)
        scores[2, 0, blocks // 2 :] = -0.0
        scores[2, 1] = -torch.inf
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            low = scores.to(dtype)
            got = block_topk(low, selected, **TRITON)
            wanted = block_topk(low, selected, **REFERENCE)
            assert torch.equal(got, wanted), f"top {selected} of {blocks} {dtype}"


@contextlib.contextmanager
def several_passes(segment_rows: int, map_bytes: int, scratch_bytes: int) -> Iterator[None]:
    """Limits so low that small inputs are cut into work_items and passes like large ones."""
    limits = (
        (block_lists, "SEGMENT_ROWS", segment_rows),
        (block_lists, "WORK_ITEM_PARTS", 2),
        (triton_lists, "_MAP_BYTES", map_bytes),
        (triton_topk, "_SCRATCH_BYTES", scratch_bytes),
    )
    before = [getattr(module, name) for module, name, _ in limits]
    for module, name, limit in limits:
        setattr(module, name, limit)
    try:
        yield
    finally:
        for (module, name, _), limit in zip(limits, before, strict=True):
            setattr(module, name, limit)


def draw_for_hopper(generator: random.Random, packed: bool) -> Case:
    """A random case that the Hopper kernels take, where there are any."""
    case = draw(generator, interpreted=False, packed=packed)
    groups = generator.choice([1, 2, 4])
    heads = groups * generator.choice([4, 8, 16, 64])
    dims = generator.choice([(64, 64), (64, 128), (128, 64), (128, 128), (192, 128)])
    return replace(
        case, heads=heads, groups=groups, head_dim=dims[0], value_dim=dims[1], block_size=64
    )


def on_gpu(generator: random.Random) -> None:
    compare_topk("cuda", generator.randrange(2**31), [(7, 64), (512, 16), (2048, 16), (4096, 64)])
    compare_leak(torch.bfloat16, "cuda", generator.randrange(2**31))
    for trial in range(6):  # most of the time goes into compiling each
        dtype = generator.choice([torch.bfloat16, torch.float16])
        case = (draw_for_hopper if trial < 3 else functools.partial(draw, interpreted=False))(
            generator, packed=trial % 2 == 1
        )
        with several_passes(generator.choice([64, 1024]), 2**22, 2**24):
            compare_lists(case, "cuda", generator.randrange(2**31))
            for sharpness in (2, 30):
                compare(case, dtype, "cuda", generator.randrange(2**31), sharpness)
        print(f"{case} agrees in {dtype}", flush=True)


def interpreted(generator: random.Random) -> None:
    def seed() -> int:
        return generator.randrange(2**31)

    compare_topk("cpu", seed(), [(1, 3), (30, 5), (300, 4), (1100, 16), (90, 64)])
    compare(Case(1, 1, 16, 16, 16, 1, 1, 1, 1), torch.float32, "cpu", seed())
    # One token: all terms of dq and dk cancel, for 16 heads that share a key.
    compare(Case(32, 2, 16, 32, 32, 3, 3, 2, 1), torch.float32, "cpu", seed())
    # Packed, in two rows whose selections differ.
    compare(Case(2, 2, 16, 16, 16, 1, 1, 2, 1, (1, 1)), torch.float32, "cpu", seed())
    # The same of a range of queries, for which the rows' keys lie apart.
    compare(Case(2, 1, 16, 16, 16, 2, 4, 2, 21, (3, 18, 21), 2, 17), torch.float32, "cpu", seed())
    compare_leak(torch.float32, "cpu", seed())
    compare_lists(Case(32, 1, 16, 16, 4, 64, 1, 1, 40), "cpu", seed())
    with several_passes(3, 300, 2**14):
        for _ in range(3):
            case = draw(generator, interpreted=True, packed=generator.random() < 0.5)
            compare_lists(replace(case, block_size=4), "cpu", seed())
        # A window that skips a tile of keys: most drawn sequences are too short for that.
        compare(Case(16, 1, 16, 32, 16, 2, 5, 1, 39, (2, 0, 37)), torch.float32, "cpu", seed())
        for packed, sharpness in ((False, 2), (True, 2), (True, 30)):
            case = draw(generator, interpreted=True, packed=packed)
            compare(case, torch.float32, "cpu", seed(), sharpness)
            print(f"{case} agrees", flush=True)


def main(seed: int) -> None:
    """Run all cases for one seed."""
    generator = random.Random(seed)
    if torch.cuda.is_available():
        on_gpu(generator)
    else:
        interpreted(generator)
    print("all cases agree")


if __name__ == "__main__":
    main(int(sys.argv[1]))
