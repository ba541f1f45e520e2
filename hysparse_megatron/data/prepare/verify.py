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
    """Check hashes, numbers of documents and tokens, every token id, and every document's end.

    Raises:
        DataError: names the file, and the offset in bytes where there is one.
    """
    note(f"reading {directory}: hashes, counts, vocabulary")
    prepared = load_prepared(directory, check_tokens=True, check_hashes=True)
    for split, prefix in zip(
        SPLITS, (prepared.train_prefix, prepared.validation_prefix), strict=True
    ):
        note(f"reading the ends of the documents of {split}")
        _check_ends(prefix, prepared.end_of_document)
    return prepared


def _check_ends(prefix: str, end_of_document: int) -> None:
    """Refuse a document that the end-of-document token does not close."""
    summary = check_indexed(prefix, may_be_empty=True)
    token_bytes = summary.dtype().itemsize
    path = f"{prefix}.bin"
    for chunk, _, chunk_ends in document_ends(f"{prefix}.idx", summary.num_documents, token_bytes):
        for start in range(0, len(chunk_ends), _DOCUMENTS_MAPPED):
            first, ends = chunk + start, chunk_ends[start : start + _DOCUMENTS_MAPPED]
            last_tokens = np.memmap(path, summary.dtype, mode="r")[ends // token_bytes - 1]
            wrong = np.flatnonzero(last_tokens != end_of_document)
            if len(wrong):
                raise DataError(
                    f"{path}: document {first + wrong[0]} ends with token "
                    f"{last_tokens[wrong[0]]} at offset {ends[wrong[0]] - token_bytes}, "
                    f"expected {end_of_document}"
                )
