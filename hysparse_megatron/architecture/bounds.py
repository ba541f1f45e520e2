"""Bounds of numbers, written beside the settings that they hold for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any

from hysparse_megatron.errors import Problem

_KEY = "bound"


@dataclass(frozen=True)
class Bound:
    """Which numbers a setting may be, and that in words."""

    holds: Callable[[float], bool]
    allowed: str
    most: float = math.inf


LARGEST = 2**31 - 1
"""What counts, sizes and places are at most, in settings and options: kernels and libraries count
so far, and loops over more would not end."""


def at_least(smallest: int, default: Any = MISSING, *, most: int = LARGEST) -> Any:
    """A field for numbers from `smallest` to `most`; null passes where the type allows it."""
    bound = Bound(lambda value: smallest <= value < math.inf, f"at least {smallest}", most)
    return field(default=default, metadata={_KEY: bound})


def above_zero(default: Any = MISSING) -> Any:
    """A field for positive, finite numbers; null passes where the type allows it."""
    return field(default=default, metadata={_KEY: _ABOVE_ZERO})


def fraction(default: Any = MISSING) -> Any:
    """A field for numbers from 0 up to, but not including, 1."""
    return field(default=default, metadata={_KEY: _FRACTION})


_ABOVE_ZERO = Bound(lambda value: 0 < value < math.inf, "a number above 0")
_FRACTION = Bound(lambda value: 0 <= value < 1, "at least 0 and below 1")


def bound_of(item: Field) -> Bound | None:
    """The bound of a field, or None if any value of its type passes."""
    return item.metadata.get(_KEY)


def bound_problems(section: Any, prefix: str = "") -> Iterator[Problem]:
    """What is out of bounds in a dataclass of settings and in those within it."""
    for item in fields(section):
        key, value = f"{prefix}{item.name}", getattr(section, item.name)
        if is_dataclass(value):
            yield from bound_problems(value, f"{key}.")
            continue
        bound = bound_of(item)
        if bound is None or value is None:
            continue
        if not bound.holds(value):
            yield Problem(key, str(value), bound.allowed)
        elif value > bound.most:
            yield Problem(key, str(value), f"at most {bound.most}")
