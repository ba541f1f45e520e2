"""Measures the rows of every table. What runs out of memory or is refused becomes a note."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import hysparse_kernels as hk
import torch
from hysparse_kernels.benchmarking.problem import FORWARD_TO_BACKWARD, Inputs, Problem
from hysparse_kernels.benchmarking.selections import visible_pairs
from hysparse_kernels.benchmarking.timer import Timer
from hysparse_kernels.benchmarking.timing import Timing
from torch import Tensor

from benchmarks import fla_peer, hybrid_block, ranges
from benchmarks.checks import first_line
from benchmarks.decode import DecodeStep, Measured, as_graph
from benchmarks.hybrid_block import HybridBlock
from benchmarks.peers import BY_TABLE, ORACLE, Call, Peer, Refused, output_of
from benchmarks.prefill import Prompt
from benchmarks.ranges import RangeRun
from benchmarks.rates import Rates
from benchmarks.rows import BACKWARD, BOTH, FORWARD, REPLAYED, Row

TABLES = ("oracle", "sparse", "window", "block", "topk", "lists", "ranges", "decode", "prefill")

RETUNE_UP_TO = 65536
"""Longest sequence for which a peer's autotuner is asked again for every selection."""


@dataclass(frozen=True)
class _Run:
    """A peer on its inputs."""

    template: Row
    call: Call
    leaves: list[Tensor]
    grad: Tensor

    def of(self, step: str) -> Call:
        """Its forward, backward, or both as one call."""
        if step == FORWARD:
            return self.call
        if step == BOTH:
            return lambda: torch.autograd.grad(output_of(self.call()), self.leaves, self.grad)
        output = output_of(self.call())

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(output, self.leaves, self.grad, retain_graph=True)

        backward()  # compiles
        return backward


@dataclass(frozen=True)
class Bench:
    """What all measurements share."""

    timer: Timer
    rates: Rates
    backend: str
    emit: Callable[[Row], None]
    """Gets every row as soon as it is there."""
    notes: dict[tuple[str, str, str], str]
    """(table, peer, shape) -> why the peer is not timed; see `checks`."""
    retune: bool = True

    def inputs(self, problem: Problem) -> Inputs:
        """Fresh tensors of a problem, bf16."""
        return Inputs.random(problem, self.timer.device, self.backend, torch.bfloat16)

    def attention(
        self, table: str, problem: Problem, selection: str | None = None, ids: Tensor | None = None
    ) -> None:
        """Rows of the oracle, sparse or window table."""
        pairs = {
            "oracle": problem.causal_pairs,
            "window": problem.window_pairs,
            "sparse": lambda: visible_pairs(_given(ids), problem),
        }[table]()
        inputs = self.inputs(problem)
        inputs.indices = ids
        with _free_memory():
            runs = []
            for peer in BY_TABLE[table]:
                if run := self._prepared(table, peer, inputs, selection):
                    runs.append(run)
            forward_flops = problem.forward_flops(pairs)
            floor = {
                FORWARD: self.rates.floor_ms(forward_flops, problem.forward_bytes()),
                BACKWARD: self.rates.floor_ms(
                    problem.backward_floor_flops(pairs), problem.backward_bytes()
                ),
            }
            floor[BOTH] = floor[FORWARD] + floor[BACKWARD]
            factor = {FORWARD: 1.0, BACKWARD: FORWARD_TO_BACKWARD, BOTH: 1 + FORWARD_TO_BACKWARD}
            for step in (FORWARD, BACKWARD) if table == "oracle" else (FORWARD, BOTH, BACKWARD):
                for row, timing, extra in self._together(step, runs):
                    self.emit(
                        replace(
                            row,
                            step=step,
                            timing=timing,
                            tflops=1e-9 * factor[step] * forward_flops / timing.median_ms,
                            floor_ms=floor[step],
                            extra_bytes=extra,
                        )
                    )

    def _prepared(
        self, table: str, peer: Peer, inputs: Inputs, selection: str | None
    ) -> _Run | None:
        """A peer that is ready to be timed; None, and a row that says why, if it cannot."""
        template = Row(table, inputs.problem, selection, peer.name, peer.label, FORWARD)
        reason = self.notes.get((table, peer.name, inputs.problem.shape))
        if reason is not None:
            self.emit(replace(template, note=reason))
            return None
        with self._reporting(template):
            if peer.name == "fla" and self.retune and inputs.problem.sequence <= RETUNE_UP_TO:
                fla_peer.forget_tuning()
            call = peer.make(inputs)
            leaves = [*inputs.leaves, inputs.sink] if peer.has_sink else list(inputs.leaves)
            call()  # compiles and tunes, whose memory is none of the forward's
            return _Run(template, call, leaves, inputs.grad)
        return None

    def _together(self, step: str, runs: list[_Run]) -> Iterator[tuple[Row, Timing, int | None]]:
        """One pass of all peers, in turns. One that fails gets a row that says so."""
        calls, extra = {}, {}
        for run in list(runs):
            with self._reporting(run.template):
                call = run.of(step)
                # With gradient, as in training: what the backward needs counts as extra memory.
                extra[run.template] = self.timer.extra_bytes(call) if step != BOTH else None
                calls[run.template] = call
            if run.template not in calls:
                runs.remove(run)
        timings = self.timer.measure_together(list(calls.values())) if calls else []
        for row, timing in zip(calls, timings, strict=True):
            yield row, timing, extra[row]

    def lists(self, problem: Problem, selection: str, ids: Tensor) -> None:
        """Building what all sparse layers of a selection share."""
        template = Row("lists", problem, selection, "hysparse", "prepare_selection", FORWARD)

        def build() -> hk.BlockLists | None:
            return hk.prepare_selection(
                ids, problem.heads, block_size=problem.block_size, backend=self.backend
            )

        with _free_memory(), self._reporting(template):
            if build() is None:
                raise Refused("nothing to build with this backend")
            self.emit(replace(template, timing=self.timer.measure(build)))

    def topk(self, problem: Problem) -> None:
        """Top-k of block scores as a separate operation; the oracle has its own inside."""
        groups = problem.batch * problem.groups
        size = (groups, problem.sequence, problem.num_blocks)
        count = min(problem.num_selected, problem.num_blocks)
        template = Row("topk", problem, None, "torch", "torch.topk", FORWARD)
        with _free_memory(), self._reporting(template):
            scores = torch.randn(size, device=self.timer.device)
            num_bytes = scores.nbytes + 4 * groups * problem.sequence * count
            calls = {
                ("torch", "torch.topk"): lambda: torch.topk(scores, count).indices,
                ("hysparse", "hysparse block_topk"): lambda: hk.block_topk(
                    scores, problem.num_selected, backend=self.backend
                ),
            }
            for (name, label), call in calls.items():
                row = replace(template, name=name, label=label)
                with self._reporting(row):
                    self.emit(
                        replace(
                            row,
                            floor_ms=self.rates.floor_ms(0, num_bytes),
                            extra_bytes=self.timer.extra_bytes(call),
                            timing=self.timer.measure(call),
                        )
                    )

    def block(self, problem: Problem, selection: str, ids: Tensor) -> None:
        """A hybrid block of 12 layers, and 12 times a full layer."""
        row = Row("block", problem, selection, "full", "", BOTH)
        inputs = self.inputs(problem)
        inputs.indices = ids
        baseline = next(
            peer for peer in ORACLE if peer.name == ("cudnn" if inputs.query.is_cuda else "sdpa")
        )
        row = replace(row, label=f"12 x one full layer, {baseline.label}")
        with _free_memory(), self._reporting(row):
            call = baseline.make(inputs)
            timing = self.timer.measure(
                lambda: torch.autograd.grad(output_of(call()), inputs.leaves, inputs.grad)
            )
            self.emit(replace(row, timing=_times(timing, hybrid_block.LAYERS)))
        row = replace(row, name="hysparse", label="1 oracle + 11 sparse and window layers")
        with _free_memory(), self._reporting(row):
            block = HybridBlock.make(inputs)
            at_once = True
            if inputs.query.is_cuda:
                torch.cuda.empty_cache()
                at_once = torch.cuda.mem_get_info()[0] > block.needs_bytes()
            how = "all backwards last" if at_once else "each backward right after its forward"
            row = replace(row, label=f"{row.label}, {how}")
            self.emit(replace(row, timing=self.timer.measure(lambda: block.run(at_once))))

    def ranges(self, problem: Problem, selection: str, ids: Tensor) -> None:
        """Every operation on all queries, and on ranges of them that together are all."""
        inputs = self.inputs(problem)
        inputs.indices = ids
        for operation in ranges.OPERATIONS:
            template = Row("ranges", problem, selection, operation, operation, FORWARD)
            for step in (FORWARD, BOTH):
                calls = {}
                with _free_memory(), self._reporting(template):
                    for chunks in (1, *ranges.CHUNKS):
                        run = RangeRun(operation, inputs, chunks)
                        call = partial(run.run, run.prepare(), backward=step == BOTH)
                        call()  # compiles
                        name, label = f"{operation}:{chunks}", f"{operation}, {chunks} ranges"
                        calls[replace(template, name=name, label=label, step=step)] = call
                    timings = self.timer.measure_together(list(calls.values()))
                    for row, timing in zip(calls, timings, strict=True):
                        self.emit(replace(row, timing=timing))

    def prefill(self, problem: Problem, selection: str, ids: Tensor, chunk: int) -> None:
        """Prompts through all layers, in chunks of so many tokens and in one piece."""
        inputs = self.inputs(problem)
        inputs.indices = ids
        tokens = problem.batch * problem.sequence
        for measured in Prompt.make(inputs, chunk).rows():
            row = Row("prefill", problem, selection, measured.name, measured.label, FORWARD)
            with _free_memory(), self._reporting(row):
                call = measured.make()
                timing = _times(self.timer.measure(call), measured.layers)
                rate = 1e3 * tokens / timing.median_ms
                self.emit(replace(row, timing=timing, tokens_per_second=rate))

    def decode(self, problem: Problem) -> None:
        """One new token a sequence: layers alone, and hybrid blocks beside full layers."""
        for dtype in (torch.bfloat16, hk.FP8):
            with _free_memory():
                template = Row("decode", problem, None, "hysparse", "decode step", FORWARD)
                with self._reporting(template):
                    step = DecodeStep.random(problem, self.timer.device, self.backend, dtype)
                    for measured in step.rows():
                        self._decode_row(template, measured)

    def _decode_row(self, template: Row, measured: Measured) -> None:
        """Launched one by one and, on a GPU, replayed as a graph."""
        batch = template.problem.batch
        row = replace(
            template,
            name=measured.name,
            label=measured.label,
            bytes_per_token=measured.layers * measured.read_bytes,
        )
        steps = [FORWARD, REPLAYED] if self.timer.device.type == "cuda" else [FORWARD]
        for step in steps:
            with self._reporting(row):
                call = as_graph(measured.call) if step == REPLAYED else measured.call
                timing = _times(self.timer.measure(call), measured.layers)
                self.emit(
                    replace(
                        row,
                        step=step,
                        timing=timing,
                        floor_ms=self.rates.floor_ms(0, batch * (row.bytes_per_token or 0)),
                        tokens_per_second=1e3 * batch / timing.median_ms,
                    )
                )

    @contextmanager
    def _reporting(self, row: Row) -> Iterator[None]:
        """Turns what goes wrong into a row with a note."""
        try:
            yield
        except Refused as refusal:
            self.emit(replace(row, note=f"refused: {refusal}"))
        except torch.cuda.OutOfMemoryError:
            self.emit(replace(row, note="out of memory"))
        except Exception as error:  # one implementation's failure must not cost all other rows
            self.emit(replace(row, note=f"failed: {first_line(error)}"))


@contextmanager
def _free_memory() -> Iterator[None]:
    """Nothing of one row's memory is there for the next."""
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _given(ids: Tensor | None) -> Tensor:
    assert ids is not None, "the sparse table needs a selection"
    return ids


def _times(timing: Timing, factor: int) -> Timing:
    return replace(
        timing,
        median_ms=factor * timing.median_ms,
        low_ms=factor * timing.low_ms,
        high_ms=factor * timing.high_ms,
    )
