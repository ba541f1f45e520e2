"""Settings as somebody writes them on the command line."""

from collections.abc import Collection
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any


def changes(section: str, before: Any, after: Any, always: Collection[str] = ()) -> dict[str, str]:
    """Key and value of what differs between two dataclasses of settings, in their order.

    Args:
        section: the key of both, such as `parallel`.
        before: what has been asked for.
        after: what is wanted: `before`, with the changes behind it.
        always: names that are written even where they are the same.
    """
    found: dict[str, str] = {}
    for item in fields(after):
        key = f"{section}.{item.name}"
        old, new = getattr(before, item.name), getattr(after, item.name)
        if is_dataclass(new):
            found |= changes(key, old, new)
        elif new != old or item.name in always:
            found[key] = written(new)
    return found


def written(value: Any) -> str:
    """A number, a flag, null or a member of an enumeration."""
    if isinstance(value, Enum):
        return str(value.value)
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
