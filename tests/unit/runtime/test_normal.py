"""Normal numbers by key and position: against plain Python, in parts, and as a distribution."""

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from hysparse_megatron.runtime import normal
from hysparse_megatron.runtime.normal import fill_normal, stream_key

MANY = 2**21


def one_number(key: int, row: int, column: int, num_columns: int) -> float:
    """In plain Python: SplitMix64 of the pair's number, then Box and Muller."""
    word = 2**64 - 1
    bits = ((row // 2 * num_columns + column) * 0x9E3779B97F4A7C15 + key) & word
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & word
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & word
    bits ^= bits >> 31
    # In fp32, whose rounding decides how near to the origin a number next to it lies.
    uniform = float(np.float32(bits & 0xFFFFFFFF) + np.float32(1))
    distance = math.sqrt(-2 * math.log(uniform / 2**32))
    angle = math.pi * (((bits >> 32) ^ 2**31) - 2**31) / 2**31
    return distance * (math.sin(angle) if row % 2 else math.cos(angle))


def drawn(rows: int, columns: int, key: int, std: float = 1.0, **options: int) -> Tensor:
    share = torch.full((rows, columns), torch.nan)
    fill_normal(share, key, std, **options)
    return share


def test_against_plain_python(rng: random.Random) -> None:
    key = rng.randrange(-(2**63), 2**63)
    first = {"first_row": rng.randrange(10**9), "first_column": rng.randrange(10**6)}
    width = 10**6 + 100
    share = drawn(33, 71, key, 0.5, num_columns=width, **first)
    for row in range(33):
        for column in range(71):
            place = (first["first_row"] + row, first["first_column"] + column)
            expected = 0.5 * one_number(key, *place, width)
            # Next to an angle of 0 the sine has the absolute rounding of an angle up to pi.
            assert float(share[row, column]) == pytest.approx(expected, rel=1e-5, abs=3e-6)


def test_parts_are_those_of_the_whole(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any cut, whatever is made at a time, to the bit; in bf16 what is rounded of it."""
    rows, columns, key = rng.randrange(1, 80), rng.randrange(1, 80), rng.randrange(2**63)
    whole = drawn(rows, columns, key, 0.02)
    for _ in range(30):
        monkeypatch.setattr(normal, "_PAIRS_PER_THREAD", rng.randrange(1, 4000))
        top, left = rng.randrange(rows), rng.randrange(columns)
        height, width = rng.randint(0, rows - top), rng.randint(0, columns - left)
        dtype = rng.choice([torch.float32, torch.bfloat16])
        buffer = torch.full((height + 2, width + 2), torch.nan, dtype=dtype)
        share = buffer[1 : height + 1, 1 : width + 1]
        place = {"first_row": top, "first_column": left, "num_columns": columns}
        fill_normal(share, key, 0.02, **place)
        assert torch.equal(share, whole[top : top + height, left : left + width].to(dtype))
        assert buffer.isnan().sum() == buffer.numel() - share.numel()


def test_the_number_of_threads_does_not_show(seed: int) -> None:
    former = torch.get_num_threads()
    shares = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            shares.append(drawn(301, 517, seed))
    finally:
        torch.set_num_threads(former)
    assert torch.equal(shares[0], shares[1])
    assert torch.equal(shares[0], shares[2])


def test_a_share_costs_no_more_than_a_share() -> None:
    """Of a matrix of 2**52 numbers."""
    share = drawn(4, 8, 1, first_row=2**26 + 1, first_column=2**25, num_columns=2**26)
    assert not share.isnan().any()
    assert share.unique().numel() == share.numel()


def test_numbers_are_normal(seed: int) -> None:
    """Moments and distribution function, five standard errors wide: red once in a million."""
    numbers = drawn(MANY // 1024, 1024, seed, 0.02).double() / 0.02
    error = MANY**-0.5
    assert abs(numbers.mean()) < 5 * error
    assert abs((numbers**2).mean() - 1) < 5 * error * 2**0.5
    assert abs((numbers**3).mean()) < 5 * error * 15**0.5
    assert abs((numbers**4).mean() - 3) < 5 * error * 96**0.5
    ordered = numbers.flatten().sort().values
    expected = torch.special.ndtr(ordered)
    found = (torch.arange(MANY, dtype=torch.float64) + 0.5) / MANY
    # Kolmogorov: beyond x once in exp(2 x**2) / 2 draws.
    assert (expected - found).abs().max() < 2.7 * error
    # Tails: of 2 million numbers 5.2 standard deviations are passed in 4 of 10 draws, 7 never.
    assert 4.2 < numbers.abs().max() < 6.7


@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (1, 1), (2, 0), (0, 2), (64, 0)])
def test_neighbours_are_independent(seed: int, shift: tuple[int, int]) -> None:
    numbers = drawn(1024, 1024, seed).double()
    down, right = shift
    one, other = numbers[down:, right:], numbers[: 1024 - down, : 1024 - right]
    bound = 5 * one.numel() ** -0.5
    assert abs((one * other).mean()) < bound
    # Squares have a variance of 2: neither are their sizes related.
    assert abs(((one**2 - 1) * (other**2 - 1)).mean() / 2) < bound


def test_keys_are_independent(seed: int) -> None:
    keys = [stream_key(seed, "weights", name) for name in ("a", "b", "aa")]
    keys += [stream_key(seed + 1, "weights", "a"), keys[0] + 1]
    shares = [drawn(256, 256, key).double().flatten() for key in keys]
    assert torch.equal(shares[0], drawn(256, 256, stream_key(seed, "weights", "a")).flatten())
    related = torch.corrcoef(torch.stack(shares)).fill_diagonal_(0)
    assert related.abs().max() < 6 / 256


def test_numbers_are_the_same_on_every_machine() -> None:
    assert stream_key(1234, "weights", "output_layer.weight") == 6514288831156176889
    assert drawn(2, 2, 5).tolist() == [
        [-0.17273275554180145, -0.717049777507782],
        [-0.7475190162658691, 0.6181442141532898],
    ]
