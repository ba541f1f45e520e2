"""Normal numbers as a function of a key and a position: no state, nothing drawn before them.

A number depends on its parameter's key and its row and column in the whole parameter, never on
which part of it a rank holds. It is made of integer arithmetic and of additions, multiplications,
divisions and square roots alone, which every device rounds alike: the same bits on CPUs and GPUs,
for any number of threads. Functions as `torch.log` may differ between devices, and in the last bit
between the middle and the end of one tensor.

Shapes: R rows and C columns of what is filled, P pairs of rows.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_PAIRS_PER_THREAD, _PAIRS_ON_GPU = 2**16, 2**22
"""Made at a time: what a core's cache holds, and what fills a GPU."""

_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""The constants of SplitMix64."""

_SQRT_HALF_BITS = 0x4F3504F3
"""The square root of 1/2 times 2**32 in fp32, as an integer."""


def stream_key(*parts: int | str) -> int:
    """A key of 64 bits, signed, that depends on every part and is the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def fill_normal(
    share: Tensor,
    key: int,
    std: float,
    *,
    first_row: int = 0,
    first_column: int = 0,
    num_columns: int | None = None,
) -> None:
    """Fill `share` [R, C] with its part of a whole matrix of normal numbers of mean 0.

    In time and memory of the share, on its device. `first_row` and `first_column` are where it
    begins in the whole matrix, which has `num_columns` (by default C). Numbers are made in fp32
    and rounded to the share's dtype. Two rows, 2p and 2p + 1, are made together.
    """
    rows, columns = share.shape
    width = columns if num_columns is None else num_columns
    end = first_row + rows
    on_cpu = share.device.type == "cpu"
    pairs_at_a_time = _PAIRS_PER_THREAD * torch.get_num_threads() if on_cpu else _PAIRS_ON_GPU
    chunk = max(1, pairs_at_a_time // max(columns, 1))
    across = torch.arange(first_column, first_column + columns, device=share.device)
    across.mul_(_signed(_GAMMA))
    with torch.no_grad(), torch._C.DisableTorchFunction():
        for start in range(first_row // 2, (end + 1) // 2, chunk):
            stop = min(start + chunk, (end + 1) // 2)
            down = torch.arange(start, stop, device=share.device).mul_(_signed(width * _GAMMA))
            pairs = _normal_pairs(down.add_(key)[:, None] + across, std).flatten(0, 1)
            low, high = max(first_row, 2 * start), min(end, 2 * stop)
            share[low - first_row : high - first_row] = pairs[low - 2 * start : high - 2 * start]


def _normal_pairs(bits: Tensor, std: float) -> Tensor:
    """Two normal numbers for each counter: int64 [P, C], overwritten -> fp32 [P, 2, C].

    By Box and Muller: an angle, and a distance from the origin.
    """
    _mix(bits)
    angle = (bits >> 32).float()  # from -2**31 to 2**31
    uniform = bits.bitwise_and_(2**32 - 1).float().add_(1.0)  # from 1 to 2**32
    distance = _log_of_share(uniform, -2.0 * std * std).sqrt_()
    # Of a fourth of the angle, then of its half, then of itself.
    cosine, twice_sine = _cosine_and_twice_the_sine(angle.mul_(math.pi / 2**33))
    half_sine = twice_sine * cosine
    twice_half_cosine = torch.rsub(twice_sine.mul_(twice_sine), 2.0)
    sine = twice_half_cosine.mul_(half_sine)
    cosine = half_sine.mul_(half_sine).mul_(-2.0).add_(1.0)
    pairs = torch.empty(bits.shape[0], 2, bits.shape[1], device=bits.device)
    torch.mul(distance, cosine, out=pairs[:, 0])
    torch.mul(distance, sine, out=pairs[:, 1])
    return pairs


def _mix(bits: Tensor) -> None:
    """Random bits of counters, in their place: SplitMix64's (Steele, Lea and Flood, 2014)."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        bits.bitwise_xor_(_shifted(bits, shift)).mul_(_signed(factor))
    bits.bitwise_xor_(_shifted(bits, 31))


def _shifted(bits: Tensor, shift: int) -> Tensor:
    """Shifted to the right, with zeros from the left (torch shifts the sign in)."""
    return (bits >> shift).bitwise_and_(2 ** (64 - shift) - 1)


def _signed(value: int) -> int:
    """What int64 makes of an integer."""
    return (value + 2**63) % 2**64 - 2**63


def _log_of_share(value: Tensor, factor: float) -> Tensor:
    """`factor` times the natural logarithm of value / 2**32, for fp32 from 1 to 2**32.

    value / 2**32 is m * 2**e with m around 1; m is kept 2**32 times as large.
    """
    bits = value.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    mantissa = (bits - (exponent << 23)).view(torch.float32)
    # ln m = 2 artanh(s), whose series ends below fp32 for |s| < 0.172.
    s = (mantissa - 2.0**32).div_(mantissa.add_(2.0**32))
    squared = s * s
    series = (squared * (factor * 2 / 9)).add_(factor * 2 / 7)
    for term in (5, 3, 1):
        series.mul_(squared).add_(factor * 2 / term)
    return series.mul_(s).add_(exponent.float().mul_(factor * math.log(2)))


def _cosine_and_twice_the_sine(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Of fp32 angles within pi / 4 of 0, by their series up to what fp32 can tell."""
    squared = angle * angle
    cosine = (squared * (1 / 40320)).sub_(1 / 720)
    for term in (1 / 24, -1 / 2, 1.0):
        cosine.mul_(squared).add_(term)
    twice_sine = (squared * (2 / 362880)).sub_(2 / 5040)
    for term in (2 / 120, -2 / 6, 2.0):
        twice_sine.mul_(squared).add_(term)
    return cosine, twice_sine.mul_(angle)
