"""Settings of scaled rotary embeddings, under the names of transformers' `rope_parameters`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from hysparse_megatron.architecture.bounds import above_zero, at_least
from hysparse_megatron.errors import Problem


class RopeType(Enum):
    """How rotary frequencies are changed for texts longer than those of pretraining."""

    none = "none"
    linear = "linear"
    llama3 = "llama3"
    yarn = "yarn"


@dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """Rotary frequencies for longer texts than a model was pretrained on; the paper has none.

    Frequencies that depend on the length of each text (dynamic NTK, longrope) are left out: keys
    in a cache would have been rotated by others than those of the queries that read them.
    """

    type: RopeType = RopeType.none
    """linear divides all frequencies by `factor`, llama3 those that turn seldom within the original
    length, yarn likewise and scales queries and keys too; `rope_type` in transformers."""
    factor: float | None = None
    """How many times longer texts may be, at least 1; needed by every type but none."""
    original_max_position_embeddings: int | None = at_least(1, default=None)
    """Length of pretraining in tokens; needed by llama3 and yarn."""
    low_freq_factor: float = 1.0
    """llama3: what turns fewer times than this within the original length is divided; as in
    Llama 3.1."""
    high_freq_factor: float = 4.0
    """llama3: what turns more often than this is kept; as in Llama 3.1."""
    beta_fast: float = 32.0
    """yarn: channels that turn more often than this within the original length are kept; the YaRN
    paper's."""
    beta_slow: float = 1.0
    """yarn: channels that turn fewer times than this are divided; the YaRN paper's."""
    truncate: bool = True
    """yarn: round the first and last channel in between outwards, as the YaRN paper does."""
    attention_factor: float | None = above_zero(default=None)
    """yarn: factor on rotated queries and keys; null is 0.1 ln(factor) + 1, the YaRN paper's."""
    mscale: float | None = None
    """yarn: with `mscale_all_dim` and no `attention_factor` that is (0.1 mscale ln(factor) + 1)
    / (0.1 mscale_all_dim ln(factor) + 1), as in DeepSeek-V3; null or 0 leaves it out."""
    mscale_all_dim: float | None = None
    """yarn: see `mscale`."""

    @property
    def attention_scale(self) -> float:
        """Factor on the cosines and sines of the rotation, with the defaults resolved."""
        if self.type is not RopeType.yarn:
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor

        def magnitude(mscale: float) -> float:
            factor = self.factor or 1.0
            return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

        if self.mscale and self.mscale_all_dim:
            return magnitude(self.mscale) / magnitude(self.mscale_all_dim)
        return magnitude(1.0)

    def parameters(self) -> dict[str, Any]:
        """Those that its type reads and that are not null, by name."""
        found = {name: getattr(self, name) for name in PARAMETERS[self.type]}
        return {name: value for name, value in found.items() if value is not None}


PARAMETERS: dict[RopeType, tuple[str, ...]] = {
    RopeType.none: (),
    RopeType.linear: ("factor",),
    RopeType.llama3: (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    RopeType.yarn: (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
    ),
}
"""What each type reads."""

_NEEDED = ("factor", "original_max_position_embeddings")


def rope_problems(rope: RopeScalingConfig) -> Iterator[Problem]:
    """What a type needs and lacks, and what would be ignored."""
    kind = f"model.rope_scaling.type = {rope.type.value}"
    read = PARAMETERS[rope.type]
    for item in fields(rope):
        value, key = getattr(rope, item.name), f"model.rope_scaling.{item.name}"
        if item.name == "type":
            continue
        if item.name not in read:
            if value != item.default:
                default = "null" if item.default is None else str(item.default).lower()
                yield Problem(key, str(value), f"{default} with {kind}, which does not read it")
        elif value is None and item.name in _NEEDED:
            yield Problem(key, "null", f"a number with {kind}")
        elif item.name == "factor" and not 1 <= value < math.inf:
            yield Problem(key, str(value), "at least 1")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if not 0 < getattr(rope, low) < getattr(rope, high) < math.inf:
            got = f"{getattr(rope, low)} (and {high} {getattr(rope, high)})"
            yield Problem(f"model.rope_scaling.{low}", got, f"above 0 and below {high}")
