"""Held-out sequences of a loaded run, and what its model loses on them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hysparse_megatron.data import EvaluationBatches, evaluation_batches
from hysparse_megatron.data.sources import load_data, open_samples
from hysparse_megatron.errors import DataError
from hysparse_megatron.inference.load import LoadedModel
from hysparse_megatron.runtime.agreement import on_every_rank
from hysparse_megatron.training.step import documents_of


def held_out_batches(
    loaded: LoadedModel, length: int, sequences: int, batch_size: int
) -> EvaluationBatches:
    """The first sequences of the validation split, `length` tokens each, the same on all ranks.

    Args:
        loaded: its configuration names the data.
        length: S, in tokens.
        sequences: how many, rounded up to whole batches; fewer if the split has no more.
        batch_size: sequences at a time, at most.

    Raises:
        DataError: there are no such data, or they have another tokenizer than the model.
    """
    config = loaded.config
    corpus = on_every_rank(lambda: load_data(config.data, config.train.seed), os_error=DataError)
    # Of weights from elsewhere the tokenizer may be unknown.
    if loaded.tokenizer_sha256 not in (None, corpus.identity()["tokenizer_sha256"]):
        raise DataError("the data have another tokenizer than the checkpoint was made with")
    samples = open_samples(corpus, "validation", length)
    size = max(1, min(batch_size, samples.num_held_out))
    return evaluation_batches(
        samples,
        num_batches=math.ceil(sequences / size),
        global_batch_size=size,
        micro_batch_size=size,
        data_parallel_size=1,
        data_parallel_rank=0,
        document_mask=config.data.document_mask,
    )


def token_losses(loaded: LoadedModel, batches: EvaluationBatches) -> Iterator[Tensor]:
    """Loss of every token in nats, [B, S] for each batch; NaN where it does not count."""
    for number in range(batches.num_batches):
        for batch in batches.microbatches(number):
            given = {name: tensor.to(loaded.device) for name, tensor in batch.items()}
            with torch.no_grad():
                losses = loaded.model(
                    given["tokens"],
                    given["position_ids"],
                    None,
                    labels=given["labels"],
                    packed_seq_params=documents_of(given),
                )
            yield losses.float().masked_fill(given["loss_mask"] == 0, math.nan)
