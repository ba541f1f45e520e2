"""An output that is there: what it was prepared from, and what else lies in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hysparse_megatron.data.card import CARD_NAME, DATA_NAMES, SENTENCEPIECE_NAME, TOKENIZER_NAME
from hysparse_megatron.data.prepare.request import hash_of
from hysparse_megatron.data.prepare.shards import Folder
from hysparse_megatron.data.prepare.sources import Source
from hysparse_megatron.data.tokenizer import PUBLISHED_WITH
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.files import naming, sha256_of

_HASHED_BYTES = 1_000_000_000
"""Of a larger corpus the times of modification are compared before the contents are."""
_PREPARED_NAMES = {CARD_NAME, TOKENIZER_NAME, SENTENCEPIECE_NAME, *DATA_NAMES, *PUBLISHED_WITH}


def is_large(sources: Sequence[Source]) -> bool:
    """Whether reading all of a corpus only to recognise it takes long."""
    return sum(source.size_bytes for source in sources) > _HASHED_BYTES


def contents_of(sources: Sequence[Source]) -> list[str]:
    """What tells files apart that have the same names and sizes."""
    return _versions(sources) if is_large(sources) else _hashes(sources)


def entries_of(sources: Sequence[Source], hashes: Mapping[int, str]) -> list[dict[str, Any]]:
    """What a card says of each source. `hashes` are SHA-256, by number, of those that have one."""
    return [
        {
            "name": source.name,
            "bytes": source.size_bytes,
            **({"sha256": hashes[n]} if n in hashes else {"version": source.version}),
        }
        for n, source in enumerate(sources)
    ]


def versions_entry(sources: Sequence[Source]) -> dict[str, str]:
    """What a card says of a large corpus: while it is true nobody has to read all of it again."""
    return {"source_versions": hash_of(_versions(sources))} if is_large(sources) else {}


def refuse_other_contents(
    path: str,
    card: Mapping[str, Any],
    sources: Sequence[Source],
    is_thorough: bool,
    note: Callable[[str], None],
) -> None:
    """Compare the inputs, whose names and sizes are known to agree, with those of a card.

    Args:
        is_thorough: compare contents also where the times of modification of a large corpus agree.

    Raises:
        ConfigError: names the output `path` and the input.
        DataError: an input cannot be read.
    """
    listed = card.get("sources", [])
    pairs = zip(listed, sources, strict=False)
    if "source_identity" not in card or any(
        source.is_local and "sha256" not in entry for entry, source in pairs
    ):
        return  # cards of earlier versions have no hashes
    if is_large(sources):
        if not is_thorough and versions_entry(sources).items() <= card.items():
            return
        note("reading the inputs, to compare them with those of the output")
    hashes = {n: sha for n, sha in enumerate(_hashes(sources)) if sources[n].is_local}
    now = entries_of(sources, hashes)
    if hash_of(now) == card["source_identity"]:
        return
    changed = (new["name"] for new, old in zip(now, listed, strict=False) if new != old)
    raise ConfigError(
        f"{path}: was prepared from other inputs of the same names and sizes "
        f"({next(changed, 'one that its card does not list')} changed); name a new folder, or "
        "replace it with --overwrite"
    )


def refuse_other_files(folder: Folder) -> None:
    """Before a local folder is replaced. Raises ConfigError: it holds what was not prepared."""
    if not folder.is_local or not os.path.isdir(folder.path):
        return
    known = set(_PREPARED_NAMES)
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # a damaged card
        known |= set(folder.read_json(CARD_NAME)["files"])
    with os.scandir(folder.path) as entries:
        others = sorted(e.name for e in entries if e.name not in known or e.is_dir())
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ConfigError(
            f"{folder.path}: would be replaced, and holds {others[0]}{more}, which no preparation "
            "made; move that elsewhere, or name a new folder"
        )


def refuse_inputs_inside(output: str, sources: Sequence[Source]) -> None:
    """Raises ConfigError: an input lies in the output, or where it is made, which are deleted."""
    places = [f"{os.path.realpath(output)}{suffix}{os.sep}" for suffix in ("", ".work")]
    for source in sources:
        if source.is_local and os.path.realpath(source.path).startswith(tuple(places)):
            raise ConfigError(
                f"{source.path}: lies inside the output {output}, which is made anew; name another "
                "output"
            )


def _versions(sources: Sequence[Source]) -> list[str]:
    return [source.version for source in sources]


def _hashes(sources: Sequence[Source]) -> list[str]:
    """SHA-256 of local files; of others the versions, which their file systems vouch for."""
    with naming("the corpus"):
        return [sha256_of(s.path) if s.is_local else s.version for s in sources]
