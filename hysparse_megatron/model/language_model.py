"""megatron-core's `HybridModel`, in which rows that only fill up the vocabulary stand for no token.

The embedding and the output projection are padded to a multiple of rows. The logits of padding
would take their share of every softmax, so that a model of few ids began with a loss above its own.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor
from torch.profiler import record_function

from hysparse_megatron.runtime.annotations import LOSS


class LanguageModel(HybridModel):
    """Embedding, decoder and output projection of one pipeline stage; a loss over real ids."""

    def __init__(self, *args: Any, num_ids: int, **kwargs: Any) -> None:
        """As `HybridModel`, with the number of token ids that exist out of its `vocab_size`."""
        super().__init__(*args, **kwargs)
        self.num_ids = num_ids
        tables = [getattr(self, "output_layer", None)]
        tables.append(self.embedding.word_embeddings if self.pre_process else None)
        for table in tables:
            if table is not None and table.weight is not None:
                # Nothing will ever change them.
                with torch.no_grad():
                    self._padding(table.weight.transpose(0, 1)).zero_()

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy [B, S] of labels [B, S] by this rank's columns of the logits [S, B, V / T].

        Padding is set to the lowest number in place and behind autograd's back: no copy is kept,
        and as its probability is exactly 0, so is the gradient that its rows would get. Not to
        minus infinity, of which a rank that holds nothing else could take no maximum.
        """
        self._padding(logits.detach()).fill_(torch.finfo(logits.dtype).min)
        with record_function(LOSS):
            return super().compute_language_model_loss(labels, logits)

    def _padding(self, columns: Tensor) -> Tensor:
        """The view of those of this rank's columns [..., V / T] that are no token's."""
        width = columns.shape[-1]
        first = self.num_ids - self.pg_collection.tp.rank() * width
        return columns[..., min(max(first, 0), width) :]
