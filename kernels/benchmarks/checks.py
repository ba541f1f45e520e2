"""Every peer against the fp64 reference on small problems, before it is timed.

Two problems: one aligned to blocks, and one with batch 2 and an odd length. A peer whose
aligned result is wrong is not timed. One that is wrong only on the odd problem is timed, and its
rows say so: the timed lengths are aligned.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace

import hysparse_kernels as hk
import torch
from hysparse_kernels.benchmarking.problem import Inputs, Problem
from hysparse_kernels.benchmarking.selections import synthetic
from hysparse_kernels.selftest.comparison import TOLERANCE, relative_error, wrong_selections
from torch import Tensor

from benchmarks import fla_peer
from benchmarks.peers import Peer, Refused, output_of


@dataclass(frozen=True)
class Check:
    """Relative errors of one peer on one problem; `failure` is empty if it passed."""

    table: str
    name: str
    problem: Problem
    errors: dict[str, float] = field(default_factory=dict)
    failure: str = ""
    refused: bool = False

    @property
    def aligned(self) -> bool:
        """Whether the problem is made of whole blocks."""
        return self.problem.sequence % self.problem.block_size == 0

    def line(self, label: str) -> str:
        """One printed line."""
        kind = "aligned" if self.aligned else f"batch {self.problem.batch}, odd"
        if self.refused:
            return f"  {label:36s} {kind:13s} refused: {self.failure}"
        numbers = "  ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        verdict = f"FAILED: {self.failure}" if self.failure else "ok"
        return f"  {label:36s} {kind:13s} {numbers}  {verdict}"


def small_problems(problem: Problem) -> tuple[Problem, Problem]:
    """The aligned and the odd problem with this one's head dims, blocks and heads per group."""
    per_group = problem.heads_per_group
    block = problem.block_size
    blocks = 8 if problem.sequence >= 8 * block else 2
    aligned = replace(problem, heads=2 * per_group, groups=2, sequence=blocks * block, batch=1)
    odd = replace(aligned, batch=2, sequence=blocks * block - block // 2 + 1)
    return aligned, odd


def check(table: str, peer: Peer, problem: Problem, device: torch.device, backend: str) -> Check:
    """Run `peer` on `problem` in bf16."""
    inputs = Inputs.random(problem, device, backend, torch.bfloat16)
    if table == "sparse":
        inputs.indices = synthetic(problem, device, clustered=True)
    leaves = [*inputs.leaves, inputs.sink] if peer.has_sink else list(inputs.leaves)
    try:
        with fla_peer.untuned() if peer.name == "fla" else contextlib.nullcontext():
            result = peer.make(inputs)()
            output = output_of(result)
            got = torch.autograd.grad(output, leaves, inputs.grad)
    except Refused as refusal:
        return Check(table, peer.name, problem, failure=str(refusal), refused=True)
    except Exception as error:  # a peer may raise anything; the others go on
        return Check(table, peer.name, problem, failure=first_line(error), refused=True)

    exact_leaves = [tensor.detach().double().requires_grad_() for tensor in leaves]
    exact = _exact(table, problem, exact_leaves, inputs.indices)
    exact_output = output_of(exact)
    wanted = torch.autograd.grad(exact_output, exact_leaves, inputs.grad.double())
    names = ("o", "dq", "dk", "dv", "dsink")[: len(got) + 1]
    pairs = zip(names, (output, *got), (exact_output, *wanted), strict=True)
    errors = {name: relative_error(a, b) for name, a, b in pairs}
    tolerance = TOLERANCE[inputs.query.dtype]
    wrong = [name for name, error in errors.items() if not error < tolerance]
    failure = f"{', '.join(wrong)} above {tolerance:.0e}" if wrong else ""
    if isinstance(exact, hk.OracleOutput) and peer.name == "hysparse":
        rows = wrong_selections(
            result.block_indices, exact, inputs.query, inputs.key, block_size=problem.block_size
        )
        if rows:
            failure = f"{failure} {rows} rows of the selection are wrong".strip()
    return Check(table, peer.name, problem, errors, failure)


def first_line(error: BaseException) -> str:
    """Type and first line of an error, short enough for a table."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:100]


def _exact(
    table: str, problem: Problem, leaves: list[Tensor], indices: Tensor | None
) -> Tensor | hk.OracleOutput:
    query, key, value, *sinks = leaves
    sink = sinks[0] if sinks else None
    if table == "oracle":
        return hk.oracle_attention(
            query,
            key,
            value,
            block_size=problem.block_size,
            num_selected=problem.num_selected,
            backend="reference",
        )
    if table == "sparse":
        assert indices is not None
        return hk.block_sparse_attention(
            query,
            key,
            value,
            indices,
            block_size=problem.block_size,
            sink=sink,
            backend="reference",
        )
    return hk.sliding_window_attention(
        query, key, value, window=problem.window, sink=sink, backend="reference"
    )
