"""Held-out sequences of a loaded run, and what its model loses on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from hysparse_megatron.config.schema import DataConfig
from hysparse_megatron.data.card import CARD_NAME
from hysparse_megatron.data.read.held_out import EvaluationBatches
from hysparse_megatron.data.run_tokenizer import find_run_tokenizer
from hysparse_megatron.data.sources import (
    TrainingData,
    load_data,
    open_samples,
    prepared_folders,
    token_text,
    trained_on_too,
    with_path,
)
from hysparse_megatron.data.tokenizer import NO_TOKEN
from hysparse_megatron.errors import DataError
from hysparse_megatron.inference.load import LoadedModel
from hysparse_megatron.model.stack import documents_of
from hysparse_megatron.runtime.agreement import on_every_rank


def held_out_batches(
    loaded: LoadedModel,
    length: int,
    sequences: int,
    batch_size: int,
    data: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> EvaluationBatches:
    """Samples of the validation split, `length` tokens each, the same on all ranks.

    With the length and number of the run's own evaluations they are the samples of those.

    Args:
        loaded: its configuration names the data.
        length: S, in tokens.
        sequences: how many; all of the split where it has no more.
        batch_size: sequences at a time, at most.
        data: text or a prepared dataset in place of the run's; all of text is evaluated, but of
            that which the run was trained on what it held out.
        note: told if the run's data are not those of the checkpoint any more, or `data` were
            trained on.

    Raises:
        DataError: there are no such data, too few, or they have another tokenizer than the model.
    """
    config = loaded.config.data
    if data is not None:
        config = _with_path(loaded, data)
    elif loaded.tokenizer_sha256 is None and config.tokenizer is None and config.blend is None:
        # Training would make a tokenizer of the text.
        raise DataError(_UNKNOWN.format(loaded.checkpoint))
    # Text is read as it was in training: a tokenizer may begin documents with a token that, in an
    # earlier version, none of the model's own did.
    has_none = bool(loaded.data) and "begin_of_document" not in loaded.data
    begin = NO_TOKEN if has_none else None
    corpus = on_every_rank(lambda: load_data(config, begin_of_document=begin), os_error=DataError)
    _refuse_other_ids(loaded, corpus, data or "the run's data")
    for line in _reservations(loaded, corpus, data):
        note(line)
    samples = open_samples(corpus, "validation", length)
    size = max(1, min(batch_size, samples.num_held_out))
    return EvaluationBatches(
        samples,
        num_samples=sequences,
        global_batch_size=size,
        micro_batch_size=size,
        document_mask=loaded.held_out.get("document_mask", config.document_mask),
    )


def _refuse_other_ids(loaded: LoadedModel, corpus: TrainingData, place: str) -> None:
    if loaded.tokenizer_sha256 not in (None, corpus.identity()["tokenizer_sha256"]):
        raise DataError(
            f"{place}: prepared with another tokenizer than that of {loaded.checkpoint}; prepare "
            "the text with the model's"
        )
    if corpus.num_ids > loaded.vocab_size:
        raise DataError(
            f"{place}: {corpus.num_ids} token ids, but the model has {loaded.vocab_size}: they "
            "are another model's"
        )
    end = loaded.data.get("end_of_document", corpus.end_of_document)
    if corpus.end_of_document != end:
        raise DataError(
            f"{place}: documents end with token {corpus.end_of_document}, in training with {end}: "
            "prepare the text with --end-of-document"
        )
    begin = loaded.data.get("begin_of_document") if loaded.data else corpus.begin_of_document
    if corpus.begin_of_document != begin:
        raise DataError(
            f"{place}: documents begin with {token_text(corpus.begin_of_document)}, in training "
            f"with {token_text(begin)}: prepare the text with --begin-of-document"
        )


def _reservations(loaded: LoadedModel, corpus: TrainingData, data: str | None) -> Iterator[str]:
    """Why a loss on these data may not be what it seems."""
    trained = loaded.data.get("fingerprint")
    if data is None and trained not in (None, corpus.fingerprint):
        found = f"fingerprint {corpus.fingerprint[:12]}, not {trained[:12]}"
        yield f"the data are not those that the checkpoint was trained on any more ({found})"
    if data is None or trained is None:
        return
    folders = prepared_folders(loaded.config.data, trained)
    if warning := trained_on_too(corpus, folders):
        yield warning
    elif not folders:
        yield (
            "whether the model was trained on this text as well is not known: what its own was "
            f"prepared into is not in {loaded.config.data.cache_dir} any more"
        )


_UNKNOWN = (
    "{} does not say its tokenizer, and without it text cannot be read: put the model's "
    "tokenizer.json beside its weights and adopt or import it again"
)


def _with_path(loaded: LoadedModel, data: str) -> DataConfig:
    """The run's settings with other data, read with the tokenizer of the model."""
    config = loaded.config.data
    tokenizer, sha256 = config.tokenizer, loaded.tokenizer_sha256
    is_text = not Path(data, CARD_NAME).is_file()
    if is_text and sha256 is not None:
        found = find_run_tokenizer(config, sha256)
        if found is None:
            raise DataError(
                f"{data}: the tokenizer of {loaded.checkpoint} is not where its settings say; "
                "prepare the text with hysparse prepare-data and the model's tokenizer"
            )
        tokenizer = str(found)
    elif is_text and tokenizer is None:
        raise DataError(_UNKNOWN.format(loaded.checkpoint))
    return with_path(config, data, tokenizer)


def token_losses(loaded: LoadedModel, batches: EvaluationBatches) -> Iterator[Tensor]:
    """Loss of every token in nats, [B, S] for each batch; NaN where it does not count.

    A loss that is no number comes as infinity: it must not be taken for one that does not count.
    """
    for number in range(batches.num_batches):
        for batch in batches.microbatches(number):
            given = {name: tensor.to(loaded.device) for name, tensor in batch.items()}
            with torch.no_grad():
                losses = loaded.model(
                    given["tokens"],
                    given["position_ids"],
                    None,
                    labels=given["labels"],
                    packed_seq_params=documents_of(given, given["tokens"].shape[1]),
                )
            losses = losses.float().nan_to_num(nan=math.inf, posinf=math.inf)
            yield losses.masked_fill(given["loss_mask"] == 0, math.nan)
