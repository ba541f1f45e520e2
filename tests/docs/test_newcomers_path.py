"""The README's path for newcomers: files, names and line ranges are those of the code."""

import ast
import re
from pathlib import Path

from hysparse_megatron.config.describe import type_of

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\S+\.py)` \| (\d+-\d+ .*?) \| ", README, flags=re.M)
MOST_LINES = 900


def spans(path: Path) -> dict[str, tuple[int, int]]:
    """First and last line of every class and function; methods as `Class.method`."""
    found = {}

    def look(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
                found[prefix + node.name] = (first, node.end_lineno or first)
                look(node.body, f"{prefix}{node.name}.")

    look(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def test_the_path_is_there_and_short() -> None:
    wrong, total = [], 0
    for name, text in ROWS:
        known = spans(ROOT / name)
        for part in text.split(", "):
            lines, _, names = part.partition(" ")
            first, *last = re.findall(r"`([\w.]+)`", names)
            start, end = known[first][0], known[(last or [first])[-1]][1]
            total += end - start + 1
            if lines != f"{start}-{end}":
                wrong.append(f"{name}: {names} is {start}-{end}, the README says {lines}")
    assert len(ROWS) > 10
    assert wrong == []
    assert total < MOST_LINES


def test_the_glossary_names_what_exists() -> None:
    for name in re.findall(r"`([\w/]+\.py)`", GLOSSARY):
        assert (ROOT / name).is_file(), name
    for key in re.findall(r"`(model\.\w+)`", GLOSSARY):
        assert type_of(key) is not None, key
    for word in re.findall(r"^\*\*(.*)\.\*\*", GLOSSARY, flags=re.M):
        assert re.search(rf"\b{word}", README, flags=re.I), f"{word} is not in the README"
    for name, path in re.findall(r"`([\w.]+)` in\n?\s*`(\S+\.py)`", GLOSSARY):
        owner = spans(ROOT / path)
        assert name.split(".")[0] in owner, name
