"""The data of a run: prepared once on every machine, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable

from hysparse_megatron.config.schema import VALIDATION, Config
from hysparse_megatron.config.skips import Skips
from hysparse_megatron.data.read.batches import BatchSource
from hysparse_megatron.data.read.held_out import EvaluationBatches
from hysparse_megatron.data.sources import (
    TrainingData,
    check_content,
    load_data,
    load_evaluations,
    open_samples,
)
from hysparse_megatron.errors import DataError
from hysparse_megatron.runtime import faults
from hysparse_megatron.runtime.agreement import agree_on, attempt_alone, require_equal
from hysparse_megatron.runtime.launcher import Rank
from hysparse_megatron.training.control import Watch
from hysparse_megatron.training.state import TrainingState

Log = Callable[[str], None]


def prepare_data(
    config: Config, rank: Rank, watch: Watch, log: Log
) -> tuple[TrainingData, dict[str, TrainingData]]:
    """The corpus, and the sets of `data.evaluation` by name.

    Built by the first rank of each machine and read from the cache by the others.
    """

    def prepare() -> tuple[TrainingData, dict[str, TrainingData]]:
        faults.reach("prepare", 0)
        corpus = load_data(config.data, log)
        return corpus, load_evaluations(config.data, corpus, log)

    first = rank.local_rank == 0
    built = _attended(watch, lambda: prepare() if first else None)
    corpus, others = _attended(watch, lambda: built or prepare())
    require_equal("the data", corpus.fingerprint, DataError)
    for name, other in others.items():
        require_equal(f"data.evaluation.{name}", other.fingerprint, DataError)
    wanted = config.model.vocab_size
    for data in (corpus, *others.values()):
        if wanted is not None and wanted < data.num_ids:
            raise DataError(
                f"model.vocab_size is {wanted}, but ids up to {data.num_ids - 1} of the tokenizer "
                f"{data.tokenizer_path} occur, which has {data.vocab_size}; raise it, or leave it "
                "out to take the tokenizer's"
            )
    verifies = first and config.data.verify
    check = _attended(
        watch, lambda: check_content([corpus, *others.values()], log) if verifies else None
    )
    if check is not None:
        watch.data_problem = lambda: check.problem
    return corpus, others


def open_batches(
    state: TrainingState, corpus: TrainingData, others: dict[str, TrainingData], watch: Watch
) -> tuple[BatchSource, dict[str, EvaluationBatches]]:
    """What is trained on, and by name what is evaluated on: nothing if train.eval_batches is 0."""
    train_config = state.config.train

    def build() -> tuple[BatchSource, dict[str, EvaluationBatches]]:
        shape = {
            "global_batch_size": train_config.global_batch_size,
            "micro_batch_size": train_config.micro_batch_size,
            "data_parallel_size": state.groups.dp.size(),
            "data_parallel_rank": state.groups.dp.rank(),
            "document_mask": state.config.data.document_mask,
        }
        samples = open_samples(corpus, "train", train_config.seq_length)
        source = BatchSource(
            samples,
            seed=train_config.seed,
            fingerprint=corpus.fingerprint,
            ramp=train_config.ramp,
            skips=Skips.parse(state.config.data.skip_steps),
            **shape,
        )
        count = train_config.num_eval_samples
        evaluations = {}
        for name, data in ({VALIDATION: corpus, **others} if count else {}).items():
            held_out = open_samples(data, "validation", train_config.seq_length)
            evaluations[name] = EvaluationBatches(held_out, num_samples=count, **shape)
        return source, evaluations

    return _attended(watch, build)


def _attended[Result](watch: Watch, action: Callable[[], Result]) -> Result:
    """`action` on every rank, with the stop flags polled meanwhile; fails on all or none."""
    attempt = watch.attend(lambda: attempt_alone(action, DataError))
    return agree_on(attempt)
