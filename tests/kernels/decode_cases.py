"""Triton decode kernels against `cached_attention` in fp64, on fresh random caches.

`python -m tests.kernels.decode_cases SEED` runs all cases, without a GPU, in Triton's interpreter
(TRITON_INTERPRET=1): in fp32, where rounding cannot hide a mistake, and in fp16. Its products of
bf16 numbers are wrong, so that bf16 is left to tests/gpu.
"""

import random
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hysparse_kernels import (
    FP8,
    Chunk,
    TokenCache,
    WindowCache,
    cached_full_attention,
    cached_sparse_attention,
    cached_window_attention,
)
from hysparse_kernels.decode import launch
from torch import Tensor

from tests.kernels import rounding
from tests.kernels.cases import Sizes
from tests.kernels.drawn_cases import poisoned_memory
from tests.kernels.rounding import Variances, assert_within

FORWARD_RESULTS = ("output", "lse", "scores")


@dataclass(frozen=True)
class Case(Sizes):
    """Sizes of one comparison; see `cached_attention` for the letters."""

    lengths: tuple[int, ...]
    """Tokens in each row of the cache, before the step."""
    rows: tuple[int, ...]
    """Of the step, in any order."""
    dtype: torch.dtype
    full_dtype: torch.dtype
    forced: tuple[int, int] = (0, 0)
    has_sinks: bool = True
    gate_per_channel: bool = False
    programs: int = 8
    """That keep the device busy, for the number of splits."""

    @property
    def widths(self) -> tuple[int, int, int]:
        return self.groups, self.head_dim, self.value_dim


def draw(rng: random.Random, dtype: torch.dtype, on_gpu: bool = False) -> Case:
    """Odd head counts and dims, ragged rows, lengths about the borders of blocks and window."""
    groups = rng.choice([1, 2, 3])
    dims = [64, 96, 128, 192, 256] if on_gpu else [5, 16, 24, 40]
    block_size = rng.choice([32, 64, 128] if on_gpu else [16, 32, 64])
    window = rng.choice([1, 5, block_size, 2 * block_size + 3, 400])
    near = rng.choice([block_size, 2 * block_size, window])
    longest = 3000 if on_gpu else 6 * block_size
    some = [0, near - 2, near - 1, near, near + 1, rng.randint(0, longest), longest - 1]
    lengths = tuple(max(0, rng.choice(some)) for _ in range(rng.randint(1, 4)))
    selected = rng.choice([1, 2, 3, 5])
    forced = rng.randint(0, selected)
    return Case(
        groups * rng.choice([1, 2, 3, 4, 7, 16, 20]),
        groups,
        rng.choice(dims),
        rng.choice(dims),
        block_size,
        selected,
        window,
        lengths,
        tuple(rng.sample(range(len(lengths)), rng.randint(1, len(lengths)))),
        dtype,
        rng.choice([dtype, FP8]),
        (forced, rng.randint(0, selected - forced)),
        rng.random() < 0.7,
        rng.random() < 0.3,
        rng.choice([1, 5, 8, 40]),
    )


class Caches:
    """An oracle's and a window's, with NaN in all places that hold no token."""

    def __init__(self, case: Case, device: torch.device) -> None:
        capacities = [length + 2 for length in case.lengths]
        self.oracle = TokenCache(capacities, *case.widths, case.full_dtype, device)
        entries = min(case.window, max(capacities))
        self.ring = WindowCache(len(capacities), entries, *case.widths, case.dtype, device)
        for tensor in (*self.oracle.tensors, *self.ring.tensors):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 127)

    @property
    def all(self) -> tuple[TokenCache, WindowCache]:
        return self.oracle, self.ring

    @property
    def bits(self) -> list[Tensor]:
        tensors = (*self.oracle.tensors, *self.ring.tensors)
        return [tensor.view(torch.uint8).clone() for tensor in tensors]


class Step:
    """Filled caches, once for each backend, and the tokens that come next."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        self.case = case
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.ours, self.theirs = Caches(case, device), Caches(case, device)
        for row, length in enumerate(case.lengths):
            if length:
                prompt = Chunk((row,), (0,), (length,), device)
                # Another window cache than the oracle's: a mix-up of the two would show.
                for kind in range(2):
                    tokens = self.normal(length, "key"), self.normal(length, "value")
                    for caches in (self.ours, self.theirs):
                        caches.all[kind].append(prompt, *tokens)
        past = tuple(case.lengths[row] for row in case.rows)
        self.chunk = Chunk(case.rows, past, (1,) * len(past), device)
        self.query, self.key, self.value = (self.new(x) for x in ("query", "key", "value"))
        self.near_key, self.near_value = self.new("key"), self.new("value")
        width = case.value_dim if case.gate_per_channel else 1
        shape = (2, 1, len(past), case.heads, width)
        gates = torch.randn(shape, generator=self.generator, device=device)
        first, second = (gate.to(case.dtype).transpose(0, 1) for gate in gates)
        apart = torch.cat([second, torch.full_like(second, torch.nan)], dim=-1)
        self.gates = [first, apart[..., :width]]
        sinks = torch.randn(2, case.heads, generator=self.generator, device=device)
        self.sinks = list(sinks) if case.has_sinks else [None, None]

    def normal(self, tokens: int, name: str) -> Tensor:
        case = self.case
        count, width = {
            "query": (case.heads, case.head_dim),
            "key": (case.groups, case.head_dim),
            "value": (case.groups, case.value_dim),
        }[name]
        device = self.generator.device
        shape = (1, tokens, count, width)
        numbers = torch.randn(shape, generator=self.generator, device=device)
        numbers[..., 0] *= 1e-7  # FP8 makes zeros of both signs of them
        return numbers.to(case.dtype)

    def new(self, name: str) -> Tensor:
        """[A, 1, ...], strided as parts of a fused projection are."""
        tokens = self.normal(len(self.chunk.rows), name)
        fused = torch.cat([tokens, torch.full_like(tokens, torch.nan)], dim=-1)
        return fused.transpose(0, 1)[..., : tokens.shape[-1]]

    def full(self, backend: str, caches: Caches, **options: Any) -> Any:
        case = self.case
        return cached_full_attention(
            self.query if backend == "triton" else self.query.double(),
            self.key,
            self.value,
            caches.oracle,
            self.chunk,
            block_size=case.block_size,
            num_selected=case.selected,
            forced_first_blocks=case.forced[0],
            forced_recent_blocks=case.forced[1],
            backend=backend,
            **options,
        )

    def sparse(self, backend: str, caches: Caches, selection: Tensor) -> Tensor:
        case = self.case
        return cached_sparse_attention(
            self.query if backend == "triton" else self.query.double(),
            self.near_key,
            self.near_value,
            *self.gates,
            caches.oracle,
            selection,
            caches.ring,
            self.chunk,
            block_size=case.block_size,
            window=case.window,
            sparse_sink=self.sinks[0],
            window_sink=self.sinks[1],
            backend=backend,
        )

    def window(self, backend: str, caches: Caches) -> Tensor:
        return cached_window_attention(
            self.query if backend == "triton" else self.query.double(),
            self.near_key,
            self.near_value,
            caches.ring,
            self.chunk,
            window=self.case.window,
            sink=self.sinks[0],
            softmax_scale=0.3,
            backend=backend,
        )

    def keys(self, cache: TokenCache | WindowCache, row: int) -> tuple[Tensor, Tensor]:
        """Key [1, S, HKV, D] and value of all tokens that the new one of a row may read."""
        length = self.case.lengths[row] + 1
        if isinstance(cache, TokenCache):
            return cache.read(row, length, torch.float64)
        count = min(length, self.case.window)
        return cache.before(row, length, count, torch.float64)

    def allowed(
        self,
        cache: TokenCache | WindowCache,
        sink: Tensor | None = None,
        selection: Tensor | None = None,
        softmax_scale: float | None = None,
    ) -> Variances:
        """Of the attention of all new tokens to what a cache holds, the tokens themselves in it."""
        found = []
        for i, row in enumerate(self.case.rows):
            key, value = self.keys(cache, row)
            seen = torch.ones(1, 1, 1, key.shape[1], dtype=torch.bool, device=key.device)
            if selection is not None:
                block = torch.arange(key.shape[1], device=key.device) // self.case.block_size
                seen = (selection[i, :, :, :, None] == block).any(2)[None]
            query, dtype = self.query[i : i + 1], self.case.dtype
            found.append(
                rounding.attention(
                    query, key, value, seen, dtype=dtype, sink=sink, softmax_scale=softmax_scale
                )
            )
        return Variances(
            *(torch.cat([getattr(part, name) for part in found]) for name in FORWARD_RESULTS)
        )

    def allowed_of_sum(self, selection: Tensor) -> Tensor:
        """Variance of a sparse layer's output, once the new tokens are in the caches."""
        total = torch.zeros((), dtype=torch.float64, device=self.query.device)
        branches = (self.theirs.oracle, selection), (self.theirs.ring, None)
        for gate, sink, (cache, chosen) in zip(self.gates, self.sinks, branches, strict=True):
            output = self.allowed(cache, sink, chosen).output
            total = total + output * gate.double().sigmoid() ** 2
        # The branches are rounded as if stored, which covers the gates, the sum and its storage.
        return rounding.SUM_OF_TWO * total


def compare(case: Case, device: torch.device, seed: int) -> None:
    """Assert outputs, selections and what stands in the caches, of every kind of layer."""
    step = Step(case, device, seed)
    ours, theirs = step.ours, step.theirs
    seen: dict[str, list[Tensor]] = {"reference": [], "triton": []}

    def keep(name: str) -> Any:
        def reduce(scores: Tensor) -> Tensor:
            seen[name].append(scores.double())
            return scores

        return reduce

    exact = step.full("reference", theirs, reduce_scores=keep("reference"))
    with poisoned_memory():
        got = step.full("triton", ours, reduce_scores=keep("triton"))
        alone = step.full("triton", ours, select=False)
    with poisoned_memory(1e30):
        bare = step.full("triton", ours)
    allowed = step.allowed(theirs.oracle)
    assert_within(got.output, exact.output, allowed.output, f"full layer of {case}")
    assert torch.equal(got.output, bare.output), f"full layer of {case} does not repeat"
    assert torch.equal(got.block_indices, bare.block_indices), f"{case}: selections do not repeat"
    assert alone.block_indices is None
    what = f"full layer without selection of {case}"
    assert_within(alone.output, exact.output, allowed.output, what)
    scored, (ours_scored,) = _all_rows(seen["reference"]), seen["triton"]
    there = scored > -torch.inf
    assert torch.equal(there, ours_scored > -torch.inf), f"{case}: visible blocks"
    # Ours are in base 2.
    scores = (ours_scored * 0.6931471805599453).masked_fill(~there, 0)
    wanted = scored.masked_fill(~there, 0)
    assert_within(scores, wanted, allowed.scores[..., None].expand_as(scores), f"scores of {case}")
    offered = _offered(scored, case, step.chunk)
    wrong = rounding.wrong_rows(got.block_indices, offered, allowed.scores)
    assert not wrong.any(), f"{case}: selection\n{got.block_indices}\n{exact.block_indices}"

    times = 2 if device.type == "cuda" else 1  # the interpreter has one order
    with poisoned_memory():
        found = [step.sparse("triton", ours, exact.block_indices) for _ in range(times)]
    assert torch.equal(found[0], found[-1]), f"sparse layer of {case} does not repeat"
    wanted = step.sparse("reference", theirs, exact.block_indices)
    of_sum = step.allowed_of_sum(exact.block_indices)
    assert_within(found[0], wanted, of_sum, f"sparse layer of {case}")
    nothing = torch.full_like(exact.block_indices, -1)
    found[0] = step.sparse("triton", ours, nothing)
    wanted = without_blocks = step.sparse("reference", theirs, nothing)
    of_sum = step.allowed_of_sum(nothing)
    assert_within(found[0], wanted, of_sum, f"sparse layer without blocks of {case}")
    with poisoned_memory():
        found = [step.window("triton", ours) for _ in range(times)]
    assert torch.equal(found[0], found[-1]), f"window layer of {case} does not repeat"
    near = step.allowed(theirs.ring, step.sinks[0], softmax_scale=0.3)
    wanted = step.window("reference", theirs)
    assert_within(found[0], wanted, near.output, f"window layer of {case}")

    # As a graph replays it: the host knows the room of every row, the device how much it has.
    past = step.chunk.past
    room = [case.lengths[row] + 2 for row in case.rows]
    step.chunk = Chunk.replayed(case.rows, room, device)
    assert step.chunk.past == tuple(most - 1 for most in room)
    step.chunk.on_device[1] = torch.tensor(past, device=device)
    with poisoned_memory():
        again = step.full("triton", ours)
    assert_within(again.output, exact.output, allowed.output, f"replayed full layer of {case}")
    wrong = rounding.wrong_rows(again.block_indices, offered, allowed.scores)
    assert not wrong.any(), (
        f"{case}: replayed selection\n{again.block_indices}\n{exact.block_indices}"
    )
    sparse = step.sparse("triton", ours, nothing)  # the reference would read the host's numbers
    assert_within(sparse, without_blocks, of_sum, f"replayed sparse layer of {case}")
    for kept, expected in zip(ours.bits, theirs.bits, strict=True):
        assert torch.equal(kept, expected), f"{case}: the caches differ"


def _all_rows(scores: list[Tensor]) -> Tensor:
    """[A, HKV, 1, N] of what the reference scores row by row, each with the blocks it has."""
    blocks = max(of_row.shape[-1] for of_row in scores)
    missing = [(0, blocks - of_row.shape[-1]) for of_row in scores]
    parts = zip(scores, missing, strict=True)
    return torch.cat([F.pad(of_row, pad, value=-torch.inf) for of_row, pad in parts])


def _offered(scores: Tensor, case: Case, chunk: Chunk) -> Tensor:
    """What is selected from: scores [A, HKV, 1, N], inf where forced, -inf if not visible."""
    own = chunk.positions[:, None, :, None] // case.block_size
    block = torch.arange(scores.shape[-1], device=scores.device)
    forced = (block < case.forced[0]) | (block > own - case.forced[1])
    return scores.masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)


def run(case: Case, device: torch.device, seed: int) -> None:
    """`compare`, with the number of splits that the case asks for."""
    real = launch._programs
    launch._programs = lambda device: case.programs
    try:
        compare(case, device, seed)
    finally:
        launch._programs = real


def main(seed: int) -> None:
    """Run all cases for one seed."""
    rng = random.Random(seed)
    cpu = torch.device("cpu")
    fp32, fp16 = torch.float32, torch.float16
    fixed = [
        # One token alone; no row has a block more than it may select.
        Case(1, 1, 16, 16, 16, 3, 4, (0,), (0,), fp32, fp32),
        # The first token of a block, the last of a window; more splits than keys.
        Case(6, 2, 24, 16, 64, 1, 128, (64, 127), (1, 0), fp32, fp32, programs=100),
        # Long blocks in pieces: head dims 192/128 need tiles of 32 keys in fp32.
        Case(
            4, 1, 192, 128, 128, 2, 70, (300, 3), (0, 1), fp32, FP8, gate_per_channel=True
        ),
        # More splits than the second kernel adds up at a time.
        Case(
            2, 1, 16, 16, 16, 4, 700, (1100,), (0,), fp32, fp32, (1, 1), has_sinks=False,
            programs=45,
        ),
    ]  # fmt: skip
    for case in [*fixed, *(draw(rng, dtype) for dtype in (fp32, fp16, fp32, fp16, fp32))]:
        run(case, cpu, rng.randrange(2**31))
        print(f"{case} agrees", flush=True)
    print("all cases agree")


if __name__ == "__main__":
    main(int(sys.argv[1]))
