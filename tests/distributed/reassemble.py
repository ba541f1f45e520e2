"""Parameters, gradients and selections of all ranks put together as one process would have them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from tests.distributed.ranks import Piece, Place, RankRun


def whole(
    parts: Sequence[tuple[Place, dict[str, Piece]]], tolerance: float = 1e-6
) -> dict[str, np.ndarray]:
    """Every parameter by name, from the pieces of all ranks.

    Raises AssertionError when two ranks that hold the same piece differ by more than `tolerance`,
    relative to its largest entry.
    """
    copies: dict[str, dict[int, list[Piece]]] = defaultdict(lambda: defaultdict(list))
    for _, named in parts:
        for name, piece in named.items():
            copies[name][piece.index].append(piece)
    result = {}
    for name, by_slice in copies.items():
        slices = [by_slice[index] for index in sorted(by_slice)]
        for same in slices:
            for piece in same[1:]:
                difference = relative_difference(same[0].value, piece.value)
                assert difference <= tolerance, f"copies of {name} differ by {difference:.1e}"
        result[name] = _join([same[0] for same in slices])
    return result


def _join(slices: list[Piece]) -> np.ndarray:
    first = slices[0]
    if first.dim is None:
        return first.value
    edges = np.cumsum(first.runs)[:-1]
    runs = [np.split(piece.value, edges, axis=first.dim) for piece in slices]
    together = (runs[i : i + first.sharing] for i in range(0, len(runs), first.sharing))
    ordered = [run for some in together for same in zip(*some, strict=True) for run in same]
    return np.concatenate(ordered, axis=first.dim)


def relative_difference(expected: np.ndarray, actual: np.ndarray) -> float:
    """Largest difference, relative to the largest entry of `expected`."""
    if expected.shape != actual.shape:
        return float("inf")
    largest = float(np.abs(expected).max(initial=0.0))
    difference = float(np.abs(expected - actual).max(initial=0.0))
    if difference == 0.0:
        return 0.0
    return difference / largest if largest > 0 else float("inf")


def in_order(by_rank: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """What context-parallel ranks hold of `axis`, in the order of the sequence.

    Of 2 P chunks rank r holds the r-th from the front and the r-th from the end.
    """
    if len(by_rank) == 1:
        return by_rank[0]
    halves = [np.split(part, 2, axis=axis) for part in by_rank]
    front, back = zip(*halves, strict=True)
    return np.concatenate([*front, *reversed(back)], axis=axis)


def _over_dp(by_dp: Sequence[np.ndarray]) -> np.ndarray:
    """Micro-batch m of rank r is number m * dp_size + r of the global batch."""
    return np.stack(by_dp, axis=1).reshape(-1, *by_dp[0].shape[1:])


def whole_selection(runs: Sequence[RankRun], step: int, num_groups: int) -> dict[int, np.ndarray]:
    """Block indices [M, B, HKV, S, K] of every oracle in one step, over all micro-batches.

    Raises AssertionError when ranks that share a KV group selected differently.
    """
    tp_size, dp_size, cp_size = _sizes(runs)
    layers = sorted({layer for run in runs for layer in run.selections[step]})
    result = {}
    for layer in layers:
        shares: dict[tuple[int, int, int], np.ndarray] = {}
        for run in runs:
            if layer not in run.selections[step]:
                continue
            # With fewer groups than ranks, several ranks hold the same group.
            group_slice = run.place.tp * min(tp_size, num_groups) // tp_size
            key = (run.place.dp, run.place.cp, group_slice)
            share = shares.setdefault(key, run.selections[step][layer])
            same = np.array_equal(share, run.selections[step][layer])
            assert same, f"ranks of one KV group selected other blocks in layer {layer}"
        result[layer] = _over_dp(
            [_over_cp(shares, dp, cp_size, tp_axis=2, cp_axis=3) for dp in range(dp_size)]
        )
    return result


def whole_routing(
    runs: Sequence[RankRun], step: int, sequence_parallel: bool
) -> dict[int, np.ndarray]:
    """Which experts every token went to in one step: bool [M, S, B, E] by layer."""
    _, dp_size, cp_size = _sizes(runs)
    layers = sorted({layer for run in runs for layer in run.routings[step]})
    result = {}
    for layer in layers:
        shares = {
            # Each tensor-parallel rank routes its part of the sequence, or all route all of it.
            (run.place.dp, run.place.cp, run.place.tp): run.routings[step][layer]
            for run in runs
            if layer in run.routings[step] and (sequence_parallel or run.place.tp == 0)
        }
        result[layer] = _over_dp(
            [_over_cp(shares, dp, cp_size, tp_axis=1, cp_axis=1) for dp in range(dp_size)]
        )
    return result


def _sizes(runs: Sequence[RankRun]) -> tuple[int, int, int]:
    """Tensor-, data- and context-parallel ranks."""
    places = [run.place for run in runs]
    return (
        1 + max(place.tp for place in places),
        1 + max(place.dp for place in places),
        1 + max(place.cp for place in places),
    )


def _over_cp(
    shares: Mapping[tuple[int, int, int], np.ndarray],
    dp: int,
    cp_size: int,
    *,
    tp_axis: int,
    cp_axis: int,
) -> np.ndarray:
    """The shares, by data-, context- and tensor-parallel rank, of one data-parallel rank."""
    by_cp = [
        np.concatenate([shares[key] for key in sorted(shares) if key[:2] == (dp, cp)], axis=tp_axis)
        for cp in range(cp_size)
    ]
    return in_order(by_cp, cp_axis)
