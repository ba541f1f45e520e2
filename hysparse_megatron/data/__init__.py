"""From text on disk to micro-batches: prepare a corpus, and read it in a fixed order.

corpus -> tokenizer -> indexed (files) -> prepare (cached) | dataset -> order -> batches.
The order of samples depends on seed and data fingerprint only.
"""

from hysparse_megatron.data.batches import BatchSource
from hysparse_megatron.data.corpus import Corpus, Document, ReadCounts, open_corpus
from hysparse_megatron.data.dataset import TokenSamples
from hysparse_megatron.data.held_out import EvaluationBatches
from hysparse_megatron.data.order import Position, sample_ids
from hysparse_megatron.data.prepare import PreparedCorpus, load_prepared, prepare_corpus
from hysparse_megatron.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "BatchSource",
    "Corpus",
    "Document",
    "EvaluationBatches",
    "Position",
    "PreparedCorpus",
    "ReadCounts",
    "TextTokenizer",
    "TokenSamples",
    "load_prepared",
    "load_tokenizer",
    "open_corpus",
    "prepare_corpus",
    "sample_ids",
    "train_tokenizer",
]
