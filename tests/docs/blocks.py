"""The code blocks of the README, of CONTRIBUTING and of all pages, and what commands they show."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
_FENCE = re.compile(r"^(\s*)```(\w*)\n(.*?)^\1```$", flags=re.M | re.S)
_INDENTED = re.compile(r"(?:\A|\n\n)((?:    .*\n)(?:(?:    .*|)\n)*)")


@dataclass(frozen=True)
class Block:
    """A block of code: where it stands, its language if that is told, and its text."""

    page: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0]}"

    @property
    def commands(self) -> list[str]:
        """Its lines as a shell reads them: joined where they go on, without remarks."""
        lines = re.sub(r" *\\\n *", " ", self.text).split("\n")
        plain = (re.sub(r"(^|\s+)# .*$", "", line).strip() for line in lines)
        return [line for line in plain if line]


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of a page of Markdown."""
    name, text = str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")
    for fence in _FENCE.finditer(text):
        yield Block(name, fence[2], fence[3])
    # API pages indent the options of mkdocstrings.
    text = re.sub(r"^::: .*\n(    .*\n)*", "", _FENCE.sub("", text), flags=re.M)
    for found in _INDENTED.finditer(text):
        yield Block(name, "", "\n".join(line[4:] for line in found[1].split("\n")).rstrip() + "\n")


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
