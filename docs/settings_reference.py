"""The page of all settings, made from the schema: type, bounds, default and sentence of each."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import get_type_hints

from hysparse_megatron.architecture.bounds import bound_of
from hysparse_megatron.config.compose import GROUPS, group_options
from hysparse_megatron.config.describe import allowed_values
from hysparse_megatron.config.schema import Config

HEAD = """\
# Settings

Every setting of a run, made from the code when this page was built. On the command line they are
`hysparse train group=preset key=value`; `--cfg job` prints all of a run. *Required* has no default:
a preset or you must give it.
"""


def page() -> str:
    """The page in Markdown: a table for every section of the schema, then the presets."""
    parts = [HEAD]
    for prefix, section in sections(Config):
        parts.append(f"## {prefix or 'The whole run'}\n\n{_flat(inspect.getdoc(section) or '')}\n")
        rows = "\n".join(_row(prefix, section, item) for item in _settings(section))
        parts.append(f"| setting | allowed | default | |\n|---|---|---|---|\n{rows}\n")
    presets = "\n".join(
        f"| `{group}` | {', '.join(f'`{name}`' for name in group_options(group))} |"
        for group in GROUPS
    )
    parts.append(f"## Presets\n\n| group | presets |\n|---|---|\n{presets}\n")
    return "\n".join(parts)


def sections(owner: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """The dotted name and the dataclass of every section with settings, outermost first."""
    yield prefix, owner
    for item in fields(owner):
        kind = get_type_hints(owner)[item.name]
        if is_dataclass(kind) and isinstance(kind, type):
            yield from sections(kind, f"{prefix}.{item.name}".lstrip("."))


@cache
def sentences(section: type) -> dict[str, str]:
    """What stands below every field of a dataclass, by the field's name."""
    [body] = ast.parse(inspect.getsource(section)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[field.target.id] = _flat(str(after.value.value))
    return found


def _settings(section: type) -> list[Field]:
    hints = get_type_hints(section)
    return [item for item in fields(section) if not is_dataclass(hints[item.name])]


def _row(prefix: str, section: type, item: Field) -> str:
    key = f"{prefix}.{item.name}".lstrip(".")
    bound = bound_of(item)
    allowed = allowed_values(key) + (f", {bound.allowed}" if bound else "")
    return f"| `{key}` | {allowed} | {_default(item)} | {sentences(section)[item.name]} |"


def _default(item: Field) -> str:
    value, make = item.default, item.default_factory
    if value is MISSING and make is MISSING:
        return "*required*"
    if make is not MISSING:
        value = make()
    if isinstance(value, Enum):
        value = value.name
    if isinstance(value, list):
        value = f"[{','.join(one.name if isinstance(one, Enum) else str(one) for one in value)}]"
    named = {None: "null", True: "true", False: "false", "": "empty"}
    return f"`{named[value] if value in (None, '') or value is True or value is False else value}`"


def _flat(text: str) -> str:
    """One line that may stand in a table's cell, where a bar needs an escape outside of code."""
    return re.sub(r"(`[^`]*`)|\|", lambda found: found[1] or "\\|", " ".join(text.split()))
