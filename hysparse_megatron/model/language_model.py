"""megatron-core's `HybridModel`, in which rows that only fill up the vocabulary stand for no token.

The embedding and the output projection are padded to a multiple of rows. The logits of padding
would take their share of every softmax, so that a model of few ids began with a loss above its own.
And whose logits need not all be there at once: those of a long sequence are larger than all else.

Shapes: S sequence on this context-parallel rank, B batch, C channels, V vocabulary, T
tensor-parallel size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    checkpoint,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.profiler import record_function

from hysparse_megatron.model.loss import CompiledCrossEntropy
from hysparse_megatron.runtime.annotations import LOSS


@contextlib.contextmanager
def _reduced_outside(layer: ColumnParallelLinear) -> Iterator[None]:
    """`layer` takes an input that all ranks have, whose gradient is reduced in front of it."""
    former = layer.explicit_expert_comm
    layer.explicit_expert_comm = True  # megatron-core's name for it
    try:
        yield
    finally:
        layer.explicit_expert_comm = former


class LanguageModel(HybridModel):
    """Embedding, decoder and output projection of one pipeline stage; a loss over real ids."""

    post_process: bool

    def __init__(
        self, *args: Any, num_ids: int, loss_chunk: int | None = None, **kwargs: Any
    ) -> None:
        """As `HybridModel`, with the number of token ids that exist out of its `vocab_size`.

        `loss_chunk`: tokens of a sequence whose logits are made at a time; None makes all at once.
        """
        super().__init__(*args, **kwargs)
        self.num_ids = num_ids
        self.loss_chunk = loss_chunk

    def clear_padding(self) -> None:
        """Set to zero what stands for no token; nothing will ever change it."""
        tables = [getattr(self, "output_layer", None)]
        tables.append(self.embedding.word_embeddings if self.pre_process else None)
        for table in tables:
            if table is not None and table.weight is not None:
                with torch.no_grad():
                    self._padding(table.weight.transpose(0, 1)).zero_()

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As `HybridModel.forward`: losses [B, S] of `labels` [B, S], logits without them, or what
        an earlier stage sends."""
        if self.loss_chunk is None or labels is None or not self.post_process:
            return super().forward(*args, labels=labels, **kwargs)
        self.post_process = False  # ends with the decoder, whose last norm is its own
        try:
            hidden = super().forward(*args, **kwargs)
        finally:
            self.post_process = True
        return self._loss_in_chunks(hidden, labels, self.loss_chunk)

    def _loss_in_chunks(self, hidden: Tensor, labels: Tensor, chunk: int) -> Tensor:
        """Losses [B, S] of hidden states [S / T or S, B, C].

        The logits of a chunk are made in the forward pass and, again, in the backward pass.
        """
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None

        def loss(rows: Tensor, of_rows: Tensor) -> Tensor:
            with _reduced_outside(self.output_layer):
                logits, _ = self.output_layer(rows, weight=weight)
            return self.compute_language_model_loss(of_rows, logits)

        pairs = zip(hidden.split(chunk), labels.split(chunk, dim=1), strict=True)
        losses = [
            checkpoint(loss, False, rows, of_rows)
            if torch.is_grad_enabled()
            else loss(rows, of_rows)
            for rows, of_rows in pairs
        ]
        return torch.cat(losses, dim=1)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy [B, S] of labels [B, S] by this rank's columns of the logits [S, B, V / T].

        Padding is set to the lowest number in place and behind autograd's back: no copy is kept,
        and as its probability is exactly 0, so is the gradient that its rows would get. Not to
        minus infinity, of which a rank that holds nothing else could take no maximum.
        """
        self._padding(logits.detach()).fill_(torch.finfo(logits.dtype).min)
        with record_function(LOSS):
            if self._loss_is_compiled:
                losses = CompiledCrossEntropy.apply(logits, labels.t(), self.pg_collection.tp)
                return losses.t().contiguous()
            return super().compute_language_model_loss(labels, logits)

    @property
    def _loss_is_compiled(self) -> bool:
        """Where megatron-core would take its own compiled loss."""
        config = self.config
        return config.cross_entropy_loss_fusion and config.cross_entropy_fusion_impl == "native"

    def _padding(self, columns: Tensor) -> Tensor:
        """The view of those of this rank's columns [..., V / T] that are no token's."""
        width = columns.shape[-1]
        first = self.num_ids - self.pg_collection.tp.rank() * width
        return columns[..., min(max(first, 0), width) :]
