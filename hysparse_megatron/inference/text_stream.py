"""Text of tokens as they come: whole characters alone, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"
"""What a tokenizer makes of bytes that are no character yet."""


class TextStream:
    """Decodes one sequence token by token.

    `stopped` is true once one of the stop strings has come; it and what follows are not given out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        """`stops`: texts that end the sequence, none of them empty."""
        self._decode = decode
        self._stops = tuple(stops)
        self._tokens: list[int] = []
        self._context = 0
        """First token decoded together with new ones: spaces depend on what stands before."""
        self._read = 0
        """Tokens whose text has been taken."""
        self._held = ""
        """Text that may be the start of a stop string."""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one more token in; the text that is certain now."""
        self._tokens.append(token)
        text = self._new_text()
        if text.endswith(_UNFINISHED):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return self._release(text, at_end=False)

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        text = self._new_text()
        self._context = self._read = len(self._tokens)
        return self._release(text, at_end=True)

    def _new_text(self) -> str:
        before = self._decode(self._tokens[self._context : self._read])
        return self._decode(self._tokens[self._context :])[len(before) :]

    def _release(self, text: str, at_end: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._take(min(found))
        kept = 0 if at_end else max(map(self._beginning_of, self._stops), default=0)
        return self._take(len(self._held) - kept)

    def _beginning_of(self, stop: str) -> int:
        """Characters at the end of the held text with which `stop` may have begun."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text
