"""Text that the model of a run goes on with, after evaluations: the likeliest token each time.

There is no cache and no second model: the schedule of an evaluation runs once for every new token,
on one sequence that is no longer than it must be. So it works on every parallel layout.

Shapes: S sequence, R its rows on this context-parallel rank, V vocabulary, T tensor-parallel size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from hysparse_megatron.config.rules.fp8 import FP8_UNIT
from hysparse_megatron.config.schema import Config
from hysparse_megatron.data.read.held_out import EvaluationBatches
from hysparse_megatron.data.run_tokenizer import load_run_tokenizer
from hysparse_megatron.data.sources import TrainingData
from hysparse_megatron.errors import ConfigError, DataError
from hysparse_megatron.model.context_parallel import Shard
from hysparse_megatron.model.pipeline import PayloadCommunicator
from hysparse_megatron.runtime.agreement import on_rank_zero
from hysparse_megatron.training.state import TrainingState

PROMPT_TOKENS = 32
"""Of the first held-out sequence, where no prompt is given."""


@dataclass(frozen=True)
class Prompt:
    """What is continued; equal on all ranks."""

    ids: list[int]
    """At least one."""
    end: int
    """The token that closes a document, with which a text ends."""
    num_hidden: int = 0
    """Of the first ids, which begin a document and are not shown."""


class TextSample:
    """Continues a prompt with the weights of now; `decode` is that of the run's tokenizer."""

    def __init__(
        self,
        state: TrainingState,
        prompt: Prompt,
        num_tokens: int,
        num_ids: int,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        """`num_tokens`: new ones, at most; `num_ids`: token ids that may come."""
        self._state, self._prompt = state, prompt
        self._num_tokens, self._num_ids = num_tokens, num_ids
        self._decode = decode
        self._length = sequence_length(state.config, len(prompt.ids) + num_tokens)
        self._communicator: PayloadCommunicator | None = None
        parallel = state.config.parallel
        if parallel.pp > 1:
            rows = self._length // (
                parallel.cp * (parallel.tp if parallel.sequence_parallel else 1)
            )
            self._communicator = PayloadCommunicator(state.groups.pp, state.megatron, rows, 1)

    def fields(self) -> dict[str, Any]:
        """`sample_prompt`, `sample` and `sample_seconds` for the row of an evaluation, which has
        put the model into evaluation mode. Collective."""
        started = time.monotonic()
        ids = list(self._prompt.ids)
        with torch.no_grad():
            for _ in range(self._num_tokens):
                ids.append(self._next(ids))
                if ids[-1] == self._prompt.end:
                    break
        # Together, as spaces depend on what stands before.
        first = self._prompt.num_hidden
        prompt = self._decode(self._prompt.ids[first:])
        text = self._decode(ids[first:])[len(prompt) :]
        seconds = time.monotonic() - started
        return {"sample_prompt": prompt, "sample": text, "sample_seconds": seconds}

    def _next(self, ids: list[int]) -> int:
        """The likeliest token after `ids`, the same on all ranks."""
        state = self._state
        tokens = torch.zeros(1, self._length, dtype=torch.int64)
        tokens[0, : len(ids)] = torch.tensor(ids)  # what follows them cannot be seen
        # Interleaved schedules take as many micro-batches as stages, or more.
        count = state.megatron.microbatch_group_size_per_vp_stage if len(state.chunks) > 1 else 1
        if self._communicator is not None:
            self._communicator.begin(count)
        iterators = [iter([tokens] * count) for _ in state.chunks]
        found = get_forward_backward_func(state.groups.pp.size(), state.config.parallel.vpp)(
            forward_step_func=partial(self._forward, len(ids) - 1),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=list(state.chunks) if len(state.chunks) > 1 else state.chunks[0],
            num_microbatches=count,
            seq_length=self._length,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
            p2p_communicator=self._communicator,
            pg_collection=state.groups,
        )
        # One data-parallel rank says it: others might round a logit differently.
        none = torch.tensor(-1, device=state.device)
        chosen = found[0] if found and state.groups.dp.rank() == 0 else none
        dist.all_reduce(chosen, op=dist.ReduceOp.MAX)
        return int(chosen)

    def _forward(self, position: int, data_iterator: Iterator[Tensor], model: torch.nn.Module):
        tokens = next(data_iterator).to(self._state.device)
        shard = Shard.of(self._state.groups.cp, self._length)
        positions = shard.positions(tokens.device)
        output = model(shard.take(tokens, 1), positions.unsqueeze(0), None)
        return output, partial(self._likeliest, positions == position)

    def _likeliest(self, is_last: Tensor, logits: Tensor, non_loss_data: bool) -> Tensor:
        """Id with the largest of logits [1, R, V / T] in the row that is marked in [R], or -1 where
        another context-parallel rank has it."""
        assert non_loss_data
        if not is_last.any():
            return torch.tensor(-1, device=logits.device)
        row = gather_from_tensor_model_parallel_region(
            logits[:, is_last], group=self._state.groups.tp
        )
        return row[0, 0, : self._num_ids].argmax()


def sequence_length(config: Config, tokens: int) -> int:
    """S of a forward pass over so many tokens: what blocks, chunks and ranks divide evenly."""
    parallel, model = config.parallel, config.model
    unit = math.lcm(model.block_size, 2 * parallel.cp * parallel.tp * FP8_UNIT)
    tails = 2 * parallel.cp * (model.window - 1) if parallel.cp > 1 else 0
    return -(-max(tokens, tails) // unit) * unit


def text_sample(
    state: TrainingState,
    corpus: TrainingData,
    held_out: EvaluationBatches,
    log: Callable[[str], None],
) -> TextSample:
    """What `tracking.sample_tokens` asks for, which is above 0. Collective.

    Raises:
        ConfigError: the prompt has no token, one that the model lacks, or leaves no place in a
            sequence.
        DataError: the tokenizer cannot be read.
    """
    tracking, most = state.config.tracking, state.config.train.seq_length
    rows = state.config.model.vocab_size or corpus.vocab_size
    sha256 = str(corpus.identity()["tokenizer_sha256"])

    def choose() -> Prompt:
        tokenizer = load_run_tokenizer(
            state.config.data, sha256, corpus.tokenizer_path, corpus.identity()
        )
        if tracking.sample_prompt is None:
            first = next(held_out.microbatches(0))["tokens"][0]
            ids, num_hidden = first[: min(PROMPT_TOKENS, most - 1)].tolist(), 0
        else:
            ids = tokenizer.encode_prompt(tracking.sample_prompt)
            num_hidden = len(tokenizer.begin)
        if max(ids, default=0) >= rows:
            raise ConfigError(
                f"tracking.sample_prompt holds token id {max(ids)}, which the tokenizer has beyond "
                f"the {rows} of the model"
            )
        if not 0 < len(ids) < most:
            raise ConfigError(
                f"tracking.sample_prompt has {len(ids)} tokens: give 1 to {most - 1}, so that one "
                f"more fits into train.seq_length={most}"
            )
        return Prompt(ids, tokenizer.end_of_document, num_hidden)

    prompt = on_rank_zero(choose, os_error=DataError)
    decode: Callable[[Sequence[int]], str] = lambda ids: ""  # noqa: E731
    if dist.get_rank() == 0:
        decode = load_run_tokenizer(state.config.data, sha256, corpus.tokenizer_path).decode
    num_tokens = min(tracking.sample_tokens, most - len(prompt.ids))
    num_ids = min(corpus.vocab_size, rows)
    log(
        f"sample: after evaluations {len(prompt.ids)} tokens are continued by up to {num_tokens}, "
        f"a forward pass over {sequence_length(state.config, len(prompt.ids) + num_tokens)} each"
    )
    return TextSample(state, prompt, num_tokens, num_ids, decode)
