"""Parameters, gradients and selections of all ranks put together as one process would have them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

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
    runs = [np.split(piece.value, first.stride, axis=first.dim) for piece in slices]
    ordered = [of_rank[index] for index in range(first.stride) for of_rank in runs]
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


def whole_selection(runs: Sequence[RankRun], step: int, num_groups: int) -> dict[int, np.ndarray]:
    """Block indices [M, B, HKV, S, K] of every oracle in one step, over all micro-batches.

    Raises AssertionError when ranks that share a KV group selected differently.
    """
    tp_size = 1 + max(run.place.tp for run in runs)
    dp_size = 1 + max(run.place.dp for run in runs)
    layers = sorted({layer for run in runs for layer in run.selections[step]})
    result = {}
    for layer in layers:
        shares: dict[tuple[int, int], np.ndarray] = {}
        for run in runs:
            if layer not in run.selections[step]:
                continue
            # With fewer groups than ranks, several ranks hold the same group.
            group_slice = run.place.tp * min(tp_size, num_groups) // tp_size
            share = shares.setdefault((run.place.dp, group_slice), run.selections[step][layer])
            same = np.array_equal(share, run.selections[step][layer])
            assert same, f"ranks of one KV group selected other blocks in layer {layer}"
        by_dp = [
            np.concatenate([shares[key] for key in sorted(shares) if key[0] == dp], axis=2)
            for dp in range(dp_size)
        ]
        # Micro-batch m of rank r is number m * dp_size + r of the global batch.
        result[layer] = np.stack(by_dp, axis=1).reshape(-1, *by_dp[0].shape[1:])
    return result


def whole_routing(
    runs: Sequence[RankRun], step: int, sequence_parallel: bool
) -> dict[int, np.ndarray]:
    """Which experts every token went to in one step: bool [M, S, B, E] by layer."""
    dp_size = 1 + max(run.place.dp for run in runs)
    layers = sorted({layer for run in runs for layer in run.routings[step]})
    result = {}
    for layer in layers:
        shares = {
            (run.place.dp, run.place.tp): run.routings[step][layer]
            for run in runs
            if layer in run.routings[step]
        }
        by_dp = []
        for dp in range(dp_size):
            # Each tensor-parallel rank routes its part of the sequence, or all route all of it.
            parts = [shares[key] for key in sorted(shares) if key[0] == dp]
            by_dp.append(np.concatenate(parts, axis=1) if sequence_parallel else parts[0])
        result[layer] = np.stack(by_dp, axis=1).reshape(-1, *by_dp[0].shape[1:])
    return result
