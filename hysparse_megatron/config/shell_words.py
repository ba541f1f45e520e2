"""Words of users that stand in a job script: what they may hold, and how they are written there.

A word is made of plain characters, of quoted text, and of variables such as `$run_dir`; nothing in
it can end the line, begin another command, or be replaced by a command's output.
"""

from __future__ import annotations

import re
import shlex
import unicodedata

_VARIABLE = r"\$(?:[A-Za-z_][A-Za-z0-9_]*|\{[A-Za-z_][A-Za-z0-9_]*\})"
_PLAIN = r"[\w@%+=:,./^\[\]-]+"
_SINGLE = r"'[^']*'"
_PIECE = rf"""{_PLAIN}|{_SINGLE}|"(?:[^"$`\\]|{_VARIABLE})*"|{_VARIABLE}"""
_WORDS = re.compile(rf"(?:{_PIECE})+(?: +(?:{_PIECE})+)*")
_DIRECTIVE_PIECE = rf"""{_PLAIN}|'[^'\\]*'|"[^"$`\\]*\""""
_DIRECTIVE = re.compile(rf"(?:{_DIRECTIVE_PIECE})+(?: +(?:{_DIRECTIVE_PIECE})+)*")

WORDS = "letters, digits and @%+=:,./^[]_-, quoted text, and variables like $HOME"
DIRECTIVE = "letters, digits and @%+=:,./^[]_-, and quoted text without $, ` and \\"


def has_control_characters(text: str) -> bool:
    """Whether there is a newline, a carriage return or anything else that is no visible text."""
    return any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in text)


def are_words(text: str) -> bool:
    """Whether `text` is words for bash; see `WORDS`."""
    return not has_control_characters(text) and _WORDS.fullmatch(text) is not None


def are_directive_words(text: str) -> bool:
    """Whether `text` is words for a line `#SBATCH`, where no variable is replaced and a backslash
    is an escape also between single quotes; see `DIRECTIVE`."""
    return not has_control_characters(text) and _DIRECTIVE.fullmatch(text) is not None


def quoted(words: str) -> str:
    """Words for bash, in which it changes nothing but variables. `are_words` must be true."""
    if not are_words(words):
        raise ValueError(f"not words for a script: {words!r}")
    return "".join(_quoted(found[0]) for found in re.finditer(rf"{_PIECE}| +", words))


def _quoted(piece: str) -> str:
    if piece.startswith("'"):
        return shlex.quote(piece[1:-1])
    if piece.startswith("$"):
        return f'"{piece}"'
    return piece if piece.startswith((" ", '"')) else shlex.quote(piece)
