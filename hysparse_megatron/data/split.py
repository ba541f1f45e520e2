"""Which documents are held out, and where a corpus of too few documents is cut."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from hysparse_megatron.data.corpus import Corpus, ReadCounts

_BORDERS = ("\n\n", "\n", " ")
"""What may end the part of a text that is trained on, the best first: paragraphs, lines, words."""


@dataclass(frozen=True)
class Cut:
    """The document of this name is trained on before a place, in characters, and held out after."""

    name: str
    place: int


def is_validation(name: str, *, seed: int, validation_fraction: float) -> bool:
    """Whether the document of this name goes to the validation split."""
    digest = hashlib.sha256(f"hysparse-split-1\0{seed}\0{name}".encode("utf-8", "surrogateescape"))
    return int.from_bytes(digest.digest()[:8], "big") < validation_fraction * 2**64


def find_cut(corpus: Corpus, *, seed: int, validation_fraction: float) -> Cut | None:
    """Where to cut the longest document of a corpus of which one split would get nothing.

    Its end is held out, as much as makes `validation_fraction` of the corpus but no more than half
    of the document. None if both splits get documents, which is known after a few of them, or none
    are wanted for validation.

    Raises:
        DataError: as `Corpus.read`.
    """
    if not validation_fraction:
        return None
    counts, splits = ReadCounts(), set()
    longest, name = "", ""
    for document in corpus.read(counts):
        splits.add(is_validation(document.name, seed=seed, validation_fraction=validation_fraction))
        if len(splits) == 2:
            return None
        if len(document.text) > len(longest):
            longest, name = document.text, document.name
    if len(longest) < 2:
        return None
    share = validation_fraction * counts.text_bytes / len(longest.encode())
    return Cut(name, _border_near(longest, round(len(longest) * (1 - min(share, 0.5)))))


def _border_near(text: str, place: int) -> int:
    """The end of the paragraph, line or word in `text` that ends nearest to `place`.

    It is at most half as far from there as the end of the text; without a border, `place` itself.
    """
    place = min(max(place, 1), len(text) - 1)
    reach = (len(text) - place) // 2
    for border in _BORDERS:
        before = text.rfind(border, place - reach, place)
        after = text.find(border, place, place + reach)
        ends = [found + len(border) for found in (before, after) if found >= 0]
        if ends:
            return min(ends, key=lambda end: abs(end - place))
    return place
