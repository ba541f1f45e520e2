"""Read a prepared corpus again and compare it with its card."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hysparse_megatron.data.card import SPLITS, PreparedCorpus, load_prepared
from hysparse_megatron.data.read.indexed import check_indexed, document_ends
from hysparse_megatron.errors import DataError

_DOCUMENTS_MAPPED = 1024
"""The file is mapped anew so often: pages that were touched count as memory of the process."""


def verify_prepared(directory: str, note: Callable[[str], None]) -> PreparedCorpus:
    """Check hashes, numbers of documents and tokens, every token id, and what stands around every
    document.

    Raises:
        DataError: names the file, and the offset in bytes where there is one.
    """
    note(f"reading {directory}: hashes, counts, vocabulary")
    prepared = load_prepared(directory, check_tokens=True, check_hashes=True)
    for split, prefix in zip(
        SPLITS, (prepared.train_prefix, prepared.validation_prefix), strict=True
    ):
        note(f"reading the ends of the documents of {split}")
        _check_ends(prefix, prepared)
    return prepared


def _check_ends(prefix: str, prepared: PreparedCorpus) -> None:
    """Refuse a document that the end-of-document token does not close, or that does not begin with
    the token that documents begin with."""
    summary = check_indexed(prefix, may_be_empty=True)
    token_bytes = summary.dtype().itemsize
    path = f"{prefix}.bin"
    index = document_ends(f"{prefix}.idx", summary.num_documents, token_bytes)
    for chunk, lengths, chunk_ends in index:
        last = chunk_ends // token_bytes - 1
        around = [("ends", last, prepared.end_of_document)]
        if prepared.begin_of_document is not None:
            around.append(("begins", last - lengths + 1, prepared.begin_of_document))
        for start in range(0, len(chunk_ends), _DOCUMENTS_MAPPED):
            for does, all_places, expected in around:
                places = all_places[start : start + _DOCUMENTS_MAPPED]
                found = np.memmap(path, summary.dtype, mode="r")[places]
                wrong = np.flatnonzero(found != expected)
                if len(wrong):
                    raise DataError(
                        f"{path}: document {chunk + start + wrong[0]} {does} with token "
                        f"{found[wrong[0]]} at offset {places[wrong[0]] * token_bytes}, "
                        f"expected {expected}"
                    )
