"""Ratios to named peers and times, with the goal beside each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from hysparse_kernels.benchmarking.problem import Problem
from hysparse_kernels.benchmarking.targets import Target

from benchmarks.ranges import CHUNKS, OPERATIONS
from benchmarks.rows import BACKWARD, BOTH, FORWARD, REPLAYED, Rows

MAIN, WIDE, MANY_GROUPS = "64/4/128/128", "64/4/192/128", "32/8/128/128"
SHORT, LONG = 32768, 131072


def targets(rows: Rows) -> list[Target]:
    """All that the rows allow. Goals are set for the shapes and lengths named above."""
    problems: dict[Problem, None] = dict.fromkeys(row.problem for row in rows.all)
    result: list[Target] = []
    training = (_oracle, _memory, _sparse, _lists, _window, _block, _topk, _ranges)
    for problem in problems:
        for rule in (*training, _decode, _prefill):
            result += rule(rows, problem)
    return [*result, *_growth(rows)]


def _where(problem: Problem) -> str:
    return f"[{problem.sequence}, {problem.shape}]"


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _oracle(rows: Rows, problem: Problem) -> Iterator[Target]:
    has_goal = problem.sequence == SHORT and problem.shape in (MAIN, WIDE, MANY_GROUPS)
    for peer, name in (("cudnn", "cuDNN"), ("flash", "FlashAttention"), ("sdpa", "SDPA on CPU")):
        for step, limit in ((FORWARD, 1.10), (BACKWARD, 1.03)):
            ours = rows.median_ms("oracle", "hysparse", step, problem)
            ratio = _ratio(ours, rows.median_ms("oracle", peer, step, problem))
            if ratio is not None:
                goal = limit if has_goal and peer == "cudnn" else None
                yield Target(f"oracle {step} / {name} {step} {_where(problem)}", ratio, goal)


def _memory(rows: Rows, problem: Problem) -> Iterator[Target]:
    row = rows.find("oracle", "hysparse", FORWARD, problem)
    if row is not None and row.extra_bytes is not None:
        text = f"oracle forward, memory beyond o, lse and indices {_where(problem)}"
        goal = 300.0 if problem.sequence == LONG else None
        yield Target(text, row.extra_bytes / 1e6, goal, " MB")


_SPARSE_GOALS = {
    (MAIN, FORWARD): 3.3,
    (MAIN, BOTH): 14.0,
    (WIDE, BOTH): 22.0,
    (MANY_GROUPS, BOTH): 12.0,
}


def _sparse(rows: Rows, problem: Problem) -> Iterator[Target]:
    for selection in _selections(rows, "sparse", problem):
        for step in (FORWARD, BACKWARD, BOTH):
            ours = rows.median_ms("sparse", "hysparse", step, problem, selection)
            text = f"block-sparse {step}, {selection} {_where(problem)}"
            goal = _SPARSE_GOALS.get((problem.shape, step))
            if ours is not None and goal and problem.sequence == SHORT and selection == "clustered":
                yield Target(text, ours, goal, " ms")
            ratio = _ratio(ours, rows.median_ms("sparse", "fla", step, problem, selection))
            if ratio is not None:
                limit = 1.0 if selection == "random" and problem.sequence == SHORT else None
                yield Target(f"{text} / fla-core", ratio, limit)


def _lists(rows: Rows, problem: Problem) -> Iterator[Target]:
    for selection in _selections(rows, "lists", problem):
        ours = rows.median_ms("lists", "hysparse", FORWARD, problem, selection)
        if ours is not None:
            goal = 1.5 if problem.sequence == SHORT else None
            yield Target(f"prepare_selection, {selection} {_where(problem)}", ours, goal, " ms")


def _window(rows: Rows, problem: Problem) -> Iterator[Target]:
    ours = rows.median_ms("window", "hysparse", BOTH, problem)
    ratio = _ratio(ours, rows.median_ms("window", "flex", BOTH, problem))
    if ratio is not None:
        goal = 0.7 if problem.sequence == SHORT else None
        yield Target(
            f"window with sinks, both / FlexAttention without {_where(problem)}", ratio, goal
        )


def _block(rows: Rows, problem: Problem) -> Iterator[Target]:
    goals = {(SHORT, MAIN): 4.0, (LONG, MAIN): 7.0}
    for selection in _selections(rows, "block", problem):
        full = rows.median_ms("block", "full", BOTH, problem, selection)
        ratio = _ratio(full, rows.median_ms("block", "hysparse", BOTH, problem, selection))
        if ratio is not None:
            text = f"hybrid block of 12 layers, {selection}, times faster {_where(problem)}"
            yield Target(
                text, ratio, goals.get((problem.sequence, problem.shape)), "", at_least=True
            )


def _topk(rows: Rows, problem: Problem) -> Iterator[Target]:
    ours = rows.median_ms("topk", "hysparse", FORWARD, problem)
    ratio = _ratio(ours, rows.median_ms("topk", "torch", FORWARD, problem))
    if ratio is not None:
        yield Target(f"block_topk / torch.topk {_where(problem)}", ratio)


def _ranges(rows: Rows, problem: Problem) -> Iterator[Target]:
    for selection in _selections(rows, "ranges", problem):
        for operation in OPERATIONS:
            for step, chunks in product((FORWARD, BOTH), CHUNKS):
                times = (
                    rows.median_ms("ranges", f"{operation}:{number}", step, problem, selection)
                    for number in (chunks, 1)
                )
                if ratio := _ratio(*times):
                    text = f"{operation} {step} in {chunks} ranges, {selection} / all at once"
                    goal = 1.05 if problem.sequence == SHORT else None
                    yield Target(f"{text} {_where(problem)}", ratio, goal)


def _decode(rows: Rows, problem: Problem) -> Iterator[Target]:
    for step in (FORWARD, REPLAYED):
        full = rows.median_ms("decode", "sdpa_block", step, problem)
        ratio = _ratio(full, rows.median_ms("decode", "hysparse", step, problem))
        if ratio is not None:
            how = "as a graph, " if step == REPLAYED else ""
            where = f"{_where(problem)}, batch {problem.batch}"
            yield Target(f"decode, hybrid block of 12 layers, {how}times faster {where}", ratio)


_PROMPTS = {
    "in chunks / in one piece": ("hysparse", "one_piece"),
    "in chunks, FP8 cache / in one piece": ("fp8", "one_piece"),
    "with full layers only, in chunks / in one piece": ("full", "full_one_piece"),
    "in chunks, times faster than with full layers only": ("full", "hysparse"),
}


def _prefill(rows: Rows, problem: Problem) -> Iterator[Target]:
    for selection in _selections(rows, "prefill", problem):
        for text, names in _PROMPTS.items():
            times = (rows.median_ms("prefill", name, FORWARD, problem, selection) for name in names)
            if ratio := _ratio(*times):
                yield Target(f"prompt {text}, {selection} {_where(problem)}", ratio)


def _growth(rows: Rows) -> Iterator[Target]:
    for problem in dict.fromkeys(row.problem for row in rows.all):
        if problem.sequence == LONG:
            short = replace(problem, sequence=SHORT)
            below = rows.median_ms("sparse", "hysparse", BOTH, short, "clustered")
            ratio = _ratio(rows.median_ms("sparse", "hysparse", BOTH, problem, "clustered"), below)
            if ratio is not None:
                text = f"block-sparse both, clustered, {LONG} / {SHORT} tokens [{problem.shape}]"
                yield Target(text, ratio, 4.4)


def _selections(rows: Rows, table: str, problem: Problem) -> list[str]:
    found = (row for row in rows.all if row.table == table and row.problem == problem)
    return list(dict.fromkeys(row.selection for row in found if row.selection))
