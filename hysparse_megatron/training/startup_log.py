"""The start-up log: what runs, on what, and what every pipeline cut sends."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from hysparse_kernels import BackendChoice, BackendUnavailable, resolve_backend

from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.architecture.parameters import parameters_of
from hysparse_megatron.config.schema import Config, Precision, Recompute
from hysparse_megatron.data.read.held_out import EvaluationBatches
from hysparse_megatron.data.sources import MANY_EPOCHS, TrainingData, count_of, epochs_of
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.model.context_parallel import describe_context
from hysparse_megatron.model.layers import describe_layers
from hysparse_megatron.model.offload import describe_offload
from hysparse_megatron.model.pipeline import describe_traffic
from hysparse_megatron.training.data_parallel import describe_overlap
from hysparse_megatron.training.state import TrainingState, describe_optimizer, rows_per_rank

Log = Callable[[str], None]


def attention_backend(config: Config, device: torch.device) -> BackendChoice:
    """The attention implementation of this run. Raises ConfigError if the wanted one cannot run."""
    model = config.model
    bf16 = config.train.precision is Precision.bf16
    try:
        return resolve_backend(
            model.backend.value,
            device,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            head_dim=max(model.head_dim, model.value_dim),
            block_size=model.block_size if parse_layout(model.layout).selects else None,
            hopper_shape=(
                model.num_attention_heads // model.num_query_groups,
                model.head_dim,
                model.value_dim,
            ),
        )
    except BackendUnavailable as error:
        raise ConfigError(f"model.backend: {error}") from error


def describe_evaluations(
    evaluations: Mapping[str, EvaluationBatches], seq_length: int, log: Log
) -> None:
    """What is evaluated on, by name; `seq_length` in tokens."""
    told = [f"{batches.num_samples:,} of {name}" for name, batches in evaluations.items()]
    samples = f"samples of {seq_length:,} tokens: {', '.join(told)}"
    log(f"evaluation on {samples}" if told else "no evaluation: train.eval_batches is 0")


def _describe_data(corpus: TrainingData, run_tokens: int, log: Log) -> None:
    log(
        f"data: {corpus.train_tokens:,} training and {corpus.validation_tokens:,} validation "
        f"tokens, vocabulary {corpus.vocab_size}, fingerprint {corpus.fingerprint[:12]}"
    )
    times = epochs_of(corpus, run_tokens)
    told = f"the whole run of {run_tokens:,} tokens reads the data {count_of(times)} times"
    warning = "WARNING: " if times > MANY_EPOCHS else ""
    log(f"{warning}{told}{'; more data would teach more' if warning else ''}")


def describe_start(state: TrainingState, corpus: TrainingData, log: Log) -> None:
    """The start-up log: what runs, on what, and what every pipeline cut sends."""
    config = state.config
    total = parameters_of(config.model, corpus.vocab_size).total
    backend = attention_backend(config, state.device)
    parallel = config.parallel
    log(
        f"{config.name}: layout {config.model.layout}, {total:,} parameters on "
        f"{state.groups.mp.size()} model-parallel ranks (tp {parallel.tp}, pp {parallel.pp}, vpp "
        f"{parallel.vpp or 1}, cp {parallel.cp}, sequence parallel "
        f"{'on' if parallel.sequence_parallel else 'off'}), "
        f"data parallel {state.groups.dp.size()}, device {state.device.type}"
    )
    log(f"attention backend {backend.name}: {backend.reason}")
    log(describe_layers(state.layers, config.model, state.megatron.grouped_experts))
    log(
        f"initial weights: {state.num_parameters():,} parameters of rank 0 built and drawn in "
        f"{state.build_seconds:.1f} s"
    )
    if config.train.recompute is not Recompute.none:
        log(f"the backward pass recomputes: {config.train.recompute_text}")
    if config.train.offload_activations:
        log(describe_offload(config.train.recompute_text, config.train.offload_min_bytes))
    log(f"optimizer: {describe_optimizer(state)}")
    if state.groups.dp_cp.size() > 1:
        log(describe_overlap(state.chunks))
    _describe_data(corpus, config.train.tokens, log)
    log(state.megatron.plan.describe())
    if parallel.cp > 1:
        train = config.train
        log(describe_context(state.megatron, train.seq_length, train.micro_batch_size))
    if parallel.pp > 1:
        log(describe_traffic(state.megatron, rows_per_rank(config), config.train.micro_batch_size))
