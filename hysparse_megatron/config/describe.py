"""What a key of the schema may hold, in words, for error messages."""

from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import Problem

_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


def type_of(key: str) -> Any:
    """The annotated type of a dotted key, or None if the schema has no such key."""
    annotation: Any = Config
    for part in key.split("."):
        if not is_dataclass(annotation):
            return None
        annotation = get_type_hints(annotation).get(part)
    return annotation


def allowed_values(key: str) -> str:
    """What the known `key` accepts: the members of an enumeration, or a type."""
    return _describe(type_of(key))


def unknown_key(key: str) -> Problem:
    """The problem of a key that the schema does not have, with the keys that were possible."""
    section, _, last = key.rpartition(".")
    owner = type_of(section) if section else Config
    if owner is None:
        return unknown_key(section)
    if not is_dataclass(owner):
        return Problem(key, "an unknown key", f"{section} is {_describe(owner)}, not a section")
    names = [item.name for item in fields(owner)]
    close = get_close_matches(last, names, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return Problem(key, "an unknown key", f"one of {', '.join(names)}{hint}")


def _describe(annotation: Any) -> str:
    if isinstance(annotation, UnionType):
        parts = [_describe(part) for part in get_args(annotation) if part is not NoneType]
        return " or ".join([*parts, "null"])
    if annotation == list[str]:
        return "a list of texts, [a,b]"
    if is_dataclass(annotation):
        return f"a section with {', '.join(item.name for item in fields(annotation))}"
    if issubclass(annotation, Enum):
        return f"one of {', '.join(member.name for member in annotation)}"
    return _TYPE_NAMES[annotation]
