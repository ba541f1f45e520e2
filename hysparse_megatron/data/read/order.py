"""The order of training samples, as a pure function.

A place counts samples since the start of training, and `sample_ids` maps places to sample ids. It
is a function, not an iterator or a shuffled table, so that:

* resuming needs one number, how many samples came before: from there on the same samples follow in
  the same order, whatever the batch size was and is;
* the number of ranks, batch and micro-batch size, the run length and the evaluation interval
  cannot change the order, because they are not arguments;
* any rank computes any position at once, in constant memory, for any number of samples.

Each epoch visits every sample once, in a permutation of its own. The permutation is a keyed Feistel
network: num_samples ids are laid out on a grid of `rows` x `columns` (the smallest near-square one
that holds them) and each round shifts one coordinate by a keyed hash of the other, which is
invertible whatever the hash. A result in the few grid cells beyond num_samples is put through the
network again until it falls inside ("cycle walking"), which keeps it a permutation.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

_NUM_ROUNDS = 12
_ORDER_VERSION = "hysparse-order-1"  # changes only together with the order itself


@dataclass(frozen=True)
class Position:
    """How far a run has come in the order; its next step begins here."""

    samples: int = 0
    """Samples trained on."""
    left_out: int = 0
    """Samples left out, because `data.skip_steps` named their step."""
    steps: int = 0
    """Steps trained on or left out."""

    @property
    def place(self) -> int:
        """Of the next sample in the order."""
        return self.samples + self.left_out


def sample_ids(
    positions: np.ndarray, *, seed: int, fingerprint: str, num_samples: int
) -> np.ndarray:
    """Sample ids at the given positions.

    Args:
        positions: samples since the start of training, integers >= 0, [n], any order.
        seed: the data seed.
        fingerprint: of the data; other data is ordered otherwise.
        num_samples: samples in one epoch.

    Returns:
        int64 [n], in 0 .. num_samples - 1.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    positions = np.asarray(positions, dtype=np.int64)
    if positions.ndim != 1 or (positions < 0).any():
        raise ValueError("positions must be one-dimensional and not negative")
    epochs, offsets = np.divmod(positions, num_samples)
    if len(positions) == 0:
        return positions
    distinct, which = np.unique(epochs, return_inverse=True)
    keys = [_round_keys(seed, fingerprint, num_samples, int(epoch)) for epoch in distinct]
    return _permute(offsets, num_samples, np.stack(keys, axis=1)[:, which])


def _round_keys(seed: int, fingerprint: str, num_samples: int, epoch: int) -> np.ndarray:
    """uint64 [_NUM_ROUNDS]: different for each seed, data and epoch."""
    label = f"{_ORDER_VERSION}\0{seed}\0{fingerprint}\0{num_samples}\0{epoch}"
    digest = hashlib.shake_256(label.encode()).digest(8 * _NUM_ROUNDS)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _permute(offsets: np.ndarray, num_samples: int, keys: np.ndarray) -> np.ndarray:
    """Permute 0 .. num_samples - 1: int64 [n] to int64 [n]; keys are uint64 [_NUM_ROUNDS, n]."""
    rows = math.isqrt(num_samples - 1) + 1
    columns = -(-num_samples // rows)
    values = _feistel(offsets.astype(np.uint64), rows, columns, keys)
    outside = np.flatnonzero(values >= num_samples)
    while len(outside):
        values[outside] = _feistel(values[outside], rows, columns, keys[:, outside])
        outside = outside[values[outside] >= num_samples]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, rows: int, columns: int, keys: np.ndarray) -> np.ndarray:
    """Permute 0 .. rows * columns - 1: uint64 [n] to uint64 [n]; keys are [_NUM_ROUNDS, n]."""
    row, column = np.divmod(values, np.uint64(columns))
    for index, key in enumerate(keys):
        if index % 2 == 0:
            row = (row + _mix(column ^ key) % np.uint64(rows)) % np.uint64(rows)
        else:
            column = (column + _mix(row ^ key) % np.uint64(columns)) % np.uint64(columns)
    permuted: np.ndarray = row * np.uint64(columns) + column
    return permuted


def _mix(values: np.ndarray) -> np.ndarray:
    """Hash uint64 [n] to uint64 [n]: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
