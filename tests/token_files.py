"""Token files of made-up documents, by Megatron's own writer."""

from collections.abc import Iterable, Sequence

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder


def write_indexed(
    prefix: str, documents: Iterable[Sequence[int] | np.ndarray], vocab_size: int
) -> str:
    """Write `<prefix>.bin` and `<prefix>.idx`; returns the prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(np.asarray(document, dtype=np.int64), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix
