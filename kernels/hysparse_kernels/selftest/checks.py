"""What the self-test checks: results against an exact computation, and that they repeat.

Shapes: B batch, S sequence, HQ query heads, HKV KV groups, D query/key head dim, DV value head dim,
K selected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hysparse_kernels import dispatch
from hysparse_kernels.call import OracleOutput
from hysparse_kernels.selftest.comparison import TOLERANCE, relative_error, wrong_selections


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison."""

    batch: int
    sequence: int
    heads: int
    groups: int
    head_dim: int
    value_dim: int
    dtype: str
    block_size: int = 64
    num_selected: int = 4
    window: int = 100
    queries: range | None = None
    """Positions of the queries; None: all."""

    @property
    def positions(self) -> range:
        """Those of the queries, whether or not they are all."""
        return range(self.sequence) if self.queries is None else self.queries

    def __str__(self) -> str:
        some = "" if self.queries is None else f" from {self.queries.start}"
        return (
            f"{self.dtype:8s} B {self.batch} S {self.sequence:4d} heads {self.heads}/{self.groups}"
            f" dims {self.head_dim}/{self.value_dim}{some}"
        )


GPU_CASES = (
    Case(1, 777, 32, 2, 128, 128, "bfloat16"),
    Case(2, 389, 8, 2, 64, 64, "float16"),
    Case(1, 640, 16, 1, 192, 128, "bfloat16"),
    Case(2, 517, 4, 4, 128, 128, "bfloat16"),
    Case(2, 517, 8, 2, 128, 128, "bfloat16", queries=range(130, 389)),
)
"""16, 4 and 1 heads per group; odd lengths, a whole number of blocks, more than one sequence, and
some of the queries of longer ones."""

CPU_CASES = (
    Case(2, 77, 8, 2, 16, 16, "float32", block_size=8, window=10),
    Case(1, 64, 4, 4, 24, 16, "bfloat16", block_size=16, num_selected=2, window=30),
    Case(2, 77, 8, 2, 16, 16, "float32", block_size=8, window=10, queries=range(13, 50)),
)


@dataclass(frozen=True)
class Check:
    """One operation in one case. `failures` is empty if all is well."""

    case: str
    operation: str
    errors: dict[str, float] = field(default_factory=dict)
    """Relative error of the output and of each gradient."""
    failures: tuple[str, ...] = ()

    def line(self) -> str:
        """One line of the table."""
        numbers = "  ".join(f"{name} {error:.0e}" for name, error in self.errors.items())
        verdict = f"FAILED: {'; '.join(self.failures)}" if self.failures else "ok"
        return f"  {self.case:45s} {self.operation:13s} {numbers:57s} {verdict}"


Operation = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor | OracleOutput]
"""query, key, value, sink -> what the operation returns."""


def run_case(case: Case, device: str, seed: int) -> list[Check]:
    """All operations of one case: Triton against the fp64 reference on a GPU.

    On a CPU the reference itself, against attention with a dense mask in fp64.
    """
    try:
        return _run_case(case, device, seed)
    except Exception as error:  # a kernel that does not compile is a failed check, not a crash
        lines = str(error).splitlines() or [""]
        return [Check(str(case), "all", {}, (f"{type(error).__name__}: {lines[0]}"[:200],))]


def _run_case(case: Case, device: str, seed: int) -> list[Check]:
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype: torch.dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    length, start = len(case.positions), case.positions.start
    query = 2 * normal(case.batch, length, case.heads, case.head_dim)
    key = normal(case.batch, case.sequence, case.groups, case.head_dim)
    value = normal(case.batch, case.sequence, case.groups, case.value_dim)
    sink = torch.randn(case.heads, generator=generator, device=device)
    grad = normal(case.batch, length, case.heads, case.value_dim)
    backend = "triton" if device == "cuda" else "reference"
    block, selected = case.block_size, case.num_selected
    exact_oracle = dispatch.oracle_attention(
        query.double(), key.double(), value.double(), block_size=block, num_selected=selected,
        query_start=start, backend="reference",
    )  # fmt: skip
    indices = exact_oracle.block_indices
    assert indices is not None
    lists = dispatch.prepare_selection(
        indices, case.heads, block_size=block, query_start=start, key_length=case.sequence,
        backend=backend,
    )  # fmt: skip

    ours: dict[str, Operation] = {
        "oracle": lambda q, k, v, s: dispatch.oracle_attention(
            q, k, v, block_size=block, num_selected=selected, query_start=start, backend=backend
        ),
        "block-sparse": lambda q, k, v, s: dispatch.block_sparse_attention(
            q, k, v, indices, block_size=block, sink=s, lists=lists, query_start=start,
            backend=backend,
        ),
        "window": lambda q, k, v, s: dispatch.sliding_window_attention(
            q, k, v, window=case.window, sink=s, query_start=start, backend=backend
        ),
    }  # fmt: skip
    exact = _reference(case, indices) if device == "cuda" else _dense(case, indices)
    checks = []
    for name, operation in ours.items():
        inputs = (query, key, value, sink)
        result, got = _gradients(operation, inputs, grad)
        _, wanted = _gradients(exact[name], tuple(x.double() for x in inputs), grad.double())
        repeated, again = _gradients(operation, inputs, grad)
        names = ("o", "dq", "dk", "dv", "dsink")[: 4 if name == "oracle" else 5]
        pairs = zip(names, got, wanted, strict=False)
        errors = {which: relative_error(a, b) for which, a, b in pairs}
        failures = [
            f"{which} above {TOLERANCE[dtype]:.0e}"
            for which, error in errors.items()
            if not error < TOLERANCE[dtype]
        ]
        # The oracle's backward may be cuDNN's, which adds up in no fixed order.
        bitwise = names[:1] if name == "oracle" else names
        same = zip(bitwise, got, again, strict=False)
        failures += [f"{which} does not repeat" for which, a, b in same if not torch.equal(a, b)]
        if isinstance(result, OracleOutput):
            failures += _selection_failures(result, repeated, exact_oracle, query, key, case)
        checks.append(Check(str(case), name, errors, tuple(failures)))
    return checks


def _selection_failures(
    result: OracleOutput,
    repeated: Tensor | OracleOutput,
    exact: OracleOutput,
    query: Tensor,
    key: Tensor,
    case: Case,
) -> list[str]:
    assert result.block_indices is not None
    assert isinstance(repeated, OracleOutput)
    assert repeated.block_indices is not None
    failures = []
    if not (result.lse.double() - exact.lse).abs().max() < 1e-4:
        failures.append("lse is off")
    wrong = wrong_selections(
        result.block_indices, exact, query, key,
        block_size=case.block_size, query_start=case.positions.start,
    )  # fmt: skip
    if wrong:
        failures.append(f"{wrong} rows select wrong blocks")
    if not torch.equal(result.block_indices, repeated.block_indices):
        failures.append("the selection does not repeat")
    return failures


def _gradients(
    operation: Operation, inputs: tuple[Tensor, ...], grad: Tensor
) -> tuple[Tensor | OracleOutput, tuple[Tensor, ...]]:
    """The result, and (output, gradients of query, key, value and, where used, sink)."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    result = operation(*leaves)
    output = result.output if isinstance(result, OracleOutput) else result
    output.backward(grad)
    found = tuple(leaf.grad for leaf in leaves if leaf.grad is not None)
    return result, (output.detach(), *found)


def _reference(case: Case, indices: Tensor) -> dict[str, Operation]:
    block, start = case.block_size, case.positions.start
    return {
        "oracle": lambda q, k, v, s: dispatch.oracle_attention(
            q,
            k,
            v,
            block_size=block,
            num_selected=case.num_selected,
            select=False,
            query_start=start,
            backend="reference",
        ),
        "block-sparse": lambda q, k, v, s: dispatch.block_sparse_attention(
            q, k, v, indices, block_size=block, sink=s, query_start=start, backend="reference"
        ),
        "window": lambda q, k, v, s: dispatch.sliding_window_attention(
            q, k, v, window=case.window, sink=s, query_start=start, backend="reference"
        ),
    }


def _dense(case: Case, indices: Tensor) -> dict[str, Operation]:
    """The same operations with a mask [B or 1, HQ or 1, S, Sk], as a textbook has them."""
    token = torch.arange(case.sequence, device=indices.device)
    at = token[case.positions.start : case.positions.stop, None]
    causal = token[None, :] <= at
    in_window = causal & (token[None, :] > at - case.window)
    block_of_key = token // case.block_size
    selected = (indices[..., None] == block_of_key).any(3) & causal
    selected = selected.repeat_interleave(case.heads // case.groups, 1)
    return {
        "oracle": lambda q, k, v, s: _masked_attention(q, k, v, causal, None),
        "block-sparse": lambda q, k, v, s: _masked_attention(q, k, v, selected, s),
        "window": lambda q, k, v, s: _masked_attention(q, k, v, in_window, s),
    }


def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sink: Tensor | None
) -> Tensor:
    per_group = query.shape[2] // key.shape[2]
    key, value = (tensor.repeat_interleave(per_group, 2) for tensor in (key, value))
    logits = torch.einsum("bshd,bthd->bhst", query, key) * query.shape[3] ** -0.5
    logits = logits.masked_fill(~mask, -torch.inf)
    if sink is not None:
        extra = sink[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, extra], -1)
    weights = logits.softmax(-1)[..., : key.shape[1]]
    return torch.einsum("bhst,bthd->bshd", weights, value)
