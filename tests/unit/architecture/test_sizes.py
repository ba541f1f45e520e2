"""Files and functions stay small enough to be read at once."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from (ROOT / folder).rglob("*.py")


def test_no_file_is_over_400_lines() -> None:
    folders = ("hysparse_megatron", "kernels", "launch", "tools", "tests", "examples")
    sizes = {path: len(path.read_text().splitlines()) for path in files(*folders)}
    assert len(sizes) > 500
    assert {path.name: size for path, size in sizes.items() if size > 400} == {}


def test_no_function_is_over_60_lines() -> None:
    """But kernels, which are of one piece by nature."""
    long = {
        f"{path.name}: {node.name}": node.end_lineno - node.lineno + 1
        for path in files("hysparse_megatron", "launch", "tools")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    }
    assert len(long) > 1000
    assert {name: size for name, size in long.items() if size > 60} == {}
