"""What one rank does in a job: train, and report what the tests compare.

Everything here runs inside a worker of `pool.py`; results are NumPy arrays and plain objects.
Shapes: S sequence, B micro-batch, M micro-batches, HKV KV groups on the rank, K selected, N blocks.
"""

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from hysparse_megatron.config.schema import Config
from hysparse_megatron.model import attend
from hysparse_megatron.runtime import megatron_on_cpu
from hysparse_megatron.training.state import TrainingState, build_state
from hysparse_megatron.training.step import evaluate, train_step
from tests.distributed.cases import VOCAB, microbatches, random_tokens, text_tokens


class Piece(NamedTuple):
    """A rank's part of one parameter (or of its gradient) and how the parts fit together."""

    value: np.ndarray
    dim: int | None
    """Dimension split over tensor-parallel ranks; None if every rank holds all of it."""
    runs: tuple[int, ...]
    """Rows of the runs that it is made of (2 for the gate and up halves of SwiGLU)."""
    sharing: int
    """How many parts, one after the other, interleave their runs."""
    index: int
    """Which of the parts this is."""


class Place(NamedTuple):
    """Where a rank stands."""

    tp: int
    pp: int
    dp: int
    cp: int = 0


@dataclass
class RankRun:
    """What a rank saw in a run of several steps."""

    place: Place
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: dict[int, dict[str, Piece]] = field(default_factory=dict)
    """By step, for the steps that were asked for."""
    initial: dict[str, Piece] = field(default_factory=dict)
    final: dict[str, Piece] = field(default_factory=dict)
    selections: list[dict[int, np.ndarray]] = field(default_factory=list)
    """By step and oracle layer: block indices [M, B, HKV, S, K]."""
    routings: list[dict[int, np.ndarray]] = field(default_factory=list)
    """By step and layer with experts: who got which token, bool [M, S / T or S, B, E]."""
    model_metrics: list[dict[str, float]] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    """The reference's choice, by step: [sequences, S + 1]."""
    redrawn: int = 0
    smallest_gap: float = float("inf")


Mutate = Callable[[TrainingState], None]


def prepare(config: Config) -> TrainingState:
    """Build a layout in this worker."""
    megatron_on_cpu.install()
    torch.set_num_threads(1)
    return build_state(config, VOCAB, torch.device("cpu"))


def place_of(state: TrainingState) -> Place:
    """This rank's place in `state`'s layout."""
    groups = state.groups
    return Place(groups.tp.rank(), groups.pp.rank(), groups.dp.rank(), groups.cp.rank())


def share_of(state: TrainingState, tokens: Tensor, labels: Tensor | None = None) -> list[dict]:
    """This rank's micro-batches of a global batch."""
    documents = state.config.data.document_mask
    return microbatches(tokens, state.groups.dp.size(), state.groups.dp.rank(), labels, documents)


def pieces(state: TrainingState, read: Callable[[torch.nn.Parameter], Tensor]) -> dict[str, Piece]:
    """`read(parameter)` of every parameter of this rank, under names that hold no rank."""
    found: dict[str, Piece] = {}
    for chunk in state.chunks:
        model = chunk.module
        for name, parameter in model.named_parameters():
            split = getattr(parameter, "tensor_model_parallel", False)
            # The last stage has a copy of a tied embedding, under another name.
            if state.config.model.tie_embeddings and name == "output_layer.weight":
                name = "embedding.word_embeddings.weight"
            is_expert = not getattr(parameter, "allreduce", True)
            group = state.groups.expt_tp if is_expert else state.groups.tp
            value = read(parameter).detach().float().numpy().copy()
            name = _global_name(state, model, name)
            runs, sharing = (), 1
            if split:
                rows, stride = parameter.shape[parameter.partition_dim], parameter.partition_stride
                runs, sharing = (rows // stride,) * stride, group.size()
            if ".linear_qkv.linear." in name and split:
                runs, sharing = _shared_runs(state, int(name.split(".")[2])) or (runs, sharing)
            found[name] = Piece(
                value,
                parameter.partition_dim if split else None,
                runs,
                sharing,
                group.rank() if split else 0,
            )
    return found


def _shared_runs(state: TrainingState, layer: int) -> tuple[tuple[int, ...], int] | None:
    """Of an input projection, where several ranks have heads of one KV group: its parts' shares."""
    model, tp = state.config.model, state.groups.tp.size()
    if tp <= model.num_query_groups:
        return None
    parts = model.attention(state.megatron.plan.layout.kinds[layer]).parts
    heads = model.num_attention_heads // tp
    sharing = tp // model.num_query_groups
    return tuple(p.width * heads if p.per_head else p.width // sharing for p in parts), sharing


def _global_name(state: TrainingState, model: torch.nn.Module, name: str) -> str:
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match is None:
        return name
    layer, rest = model.decoder.layers[int(match[1])], match[2]
    expert = re.match(r"mlp\.experts\.local_experts\.(\d+)\.(.*)", rest)
    if expert is not None:
        first = state.groups.ep.rank() * layer.mlp.num_local_experts
        rest = f"mlp.experts.{first + int(expert[1])}.{expert[2]}"
    return f"decoder.layers.{layer.layer_number - 1}.{rest}"


@contextlib.contextmanager
def whole_gradients(state: TrainingState, into: dict[str, Piece]) -> Iterator[None]:
    """Copy every gradient after megatron-core has finalised it, before the optimizer uses it.

    With the distributed optimizer each data-parallel rank would be left with its share only, so
    the reduction is made an all-reduce.
    """

    def finalize(model: list, num_tokens: Tensor | None = None, **options: Any) -> None:
        finalize_model_grads(model, num_tokens, **options)
        into.update(pieces(state, lambda parameter: parameter.main_grad))

    with contextlib.ExitStack() as patches:
        put = mock.patch.object
        patches.enter_context(put(state.megatron, "finalize_model_grads_func", finalize))
        for chunk in state.chunks:
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                start = partial(_all_reduce, group, group.start_grad_sync)
                patches.enter_context(put(group, "start_grad_sync", start))
        yield


def _all_reduce(group: Any, start: Callable[..., None], force_all_reduce: bool = False) -> None:
    start(force_all_reduce=True)
    if group.ddp_config.num_distributed_optimizer_instances == 1:
        return
    # Between instances of the optimizer megatron-core sums a rank's share alone.
    within = group.intra_distributed_optimizer_instance_group
    for bucket in group.buckets:
        share = bucket.grad_data.chunk(within.size())[within.rank()].clone()
        dist.all_gather_into_tensor(bucket.grad_data, share, group=within)


class SelectionRecorder:
    """Keeps every selection of blocks and of experts, by layer, in the order of micro-batches."""

    def __init__(self, measure_gaps: bool = False, chunks: int = 1) -> None:
        """`chunks`: calls of the oracle that make the selection of one micro-batch."""
        self._chunks = chunks
        self.made: dict[int, list[np.ndarray]] = defaultdict(list)
        self.routed: dict[int, list[np.ndarray]] = defaultdict(list)
        self.smallest_gap = float("inf")
        self._measure_gaps = measure_gaps
        self._layer = -1

    def take(self) -> dict[int, np.ndarray]:
        """What was recorded since the last call: [M, B, HKV, S, K] by layer."""
        taken = {
            layer: np.stack(
                [
                    np.concatenate(indices[first : first + self._chunks], axis=2)
                    for first in range(0, len(indices), self._chunks)
                ]
            )
            for layer, indices in self.made.items()
        }
        self.made.clear()
        return taken

    def take_routing(self) -> dict[int, np.ndarray]:
        """Which experts were chosen since the last call: bool [M, S / T or S, B, E] by layer."""
        taken = {layer: np.stack(maps) for layer, maps in self.routed.items()}
        self.routed.clear()
        return taken

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Record while this context is open."""
        full, oracle = attend.TrainingAttend.full, attend.oracle_attention
        routing = TopKRouter.routing

        def recorded_routing(router: TopKRouter, logits: Tensor, **options: Any) -> Any:
            if self._measure_gaps:
                self._measure_routing(router, logits.detach())
            probabilities, chosen = routing(router, logits, **options)
            # Full recompute routes a first time without gradient.
            if torch.is_grad_enabled():
                layer = router.layer_number - 1
                self.routed[layer].append(chosen.view(logits.shape).numpy().copy())
            return probabilities, chosen

        def named_full(attending: attend.TrainingAttend, layer: int, *tensors: Tensor) -> Any:
            self._layer = layer
            return full(attending, layer, *tensors)

        def recorded(*tensors: Tensor, select: bool, **options: Any) -> Any:
            if select and self._measure_gaps:
                options["reduce_scores"] = partial(self._measure, options)
            result = oracle(*tensors, select=select, **options)
            if select:
                self.made[self._layer].append(result.block_indices.numpy().copy())
            return result

        with (
            mock.patch.object(attend.TrainingAttend, "full", named_full),
            mock.patch.object(attend, "oracle_attention", recorded),
            mock.patch.object(TopKRouter, "routing", recorded_routing),
        ):
            yield

    def _measure_routing(self, router: TopKRouter, logits: Tensor) -> None:
        """Distance between the last expert that is in and the first that is out."""
        scores = logits
        if router.score_function == "sigmoid":
            scores = torch.sigmoid(logits)
            if router.expert_bias is not None:
                scores = scores + router.expert_bias
            scores = 4 * scores  # a logit's rounding moves its sigmoid by a quarter of it at most
        ranked = scores.sort(-1, descending=True).values
        gaps = ranked[..., router.topk - 1] - ranked[..., router.topk]
        self.smallest_gap = min(self.smallest_gap, float(gaps.min()))

    def _measure(self, options: dict[str, Any], scores: Tensor) -> Tensor:
        """Distance in log score between the last block that is in and the first that is out."""
        count, (queries, num_blocks) = options["num_selected"], scores.shape[-2:]
        if num_blocks <= count:
            return scores  # nothing is left out
        own = torch.arange(queries).unsqueeze(1) // options["block_size"]
        blocks = torch.arange(num_blocks)
        forced = (blocks < options["forced_first_blocks"]) | (
            blocks > own - options["forced_recent_blocks"]
        )
        ranked = scores.masked_fill(forced, torch.inf).masked_fill(blocks > own, -torch.inf)
        ranked = ranked.sort(-1, descending=True).values
        gaps = (ranked[..., count - 1] - ranked[..., count])[ranked[..., count].isfinite()]
        if gaps.numel():
            self.smallest_gap = min(self.smallest_gap, float(gaps.min()))
        return scores


def train(
    rank: int,
    config: Config,
    tokens: Sequence[np.ndarray],
    gradient_steps: Sequence[int] = (),
    mutate: Mutate | None = None,
) -> RankRun:
    """One step per global batch of `tokens`."""
    state = prepare(config)
    if mutate is not None:
        mutate(state)
    run = RankRun(place_of(state), initial=pieces(state, lambda parameter: parameter))
    recorder = SelectionRecorder(chunks=2 if config.parallel.cp > 1 else 1)
    with recorder.watch():
        for step, batch in enumerate(tokens):
            _step(state, run, step, torch.from_numpy(batch), step in gradient_steps)
            run.selections.append(recorder.take())
            run.routings.append(recorder.take_routing())
    state.settle()
    run.final = pieces(state, lambda parameter: parameter)
    return run


def _step(
    state: TrainingState, run: RankRun, step: int, tokens: Tensor, with_gradients: bool
) -> None:
    gradients: dict[str, Piece] = {}
    with whole_gradients(state, gradients) if with_gradients else contextlib.nullcontext():
        result = train_step(state, step, share_of(state, tokens))
    if with_gradients:
        run.gradients[step] = gradients
    run.losses.append(result.loss)
    run.grad_norms.append(result.grad_norm)
    run.model_metrics.append(result.model_metrics)


def train_reference(
    rank: int,
    config: Config,
    seed: int,
    steps: int,
    gradient_steps: Sequence[int],
    least_gap: float,
    most_tries: int,
    text: bytes | None = None,
) -> RankRun:
    """Train on one process and choose every step's batch so that its selections are no near-ties.

    Layouts round differently. Where two blocks score almost alike that may flip a selection, which
    is right and yet changes everything after it. A batch with such a pair is drawn anew. The
    tokens are random, or the bytes of `text`.
    """
    sequences, length = config.train.global_batch_size, config.train.seq_length
    state = prepare(config)
    run = RankRun(place_of(state), initial=pieces(state, lambda parameter: parameter))
    recorder = SelectionRecorder()
    for step in range(steps):
        for attempt in range(most_tries):
            if text is None:
                tokens = random_tokens(seed, step, attempt, sequences=sequences, length=length)
            else:
                tokens = text_tokens(text, length, seed, step, attempt, sequences=sequences)
            scout = SelectionRecorder(measure_gaps=True)
            with scout.watch():
                evaluate(state, [share_of(state, tokens)])
            if scout.smallest_gap >= least_gap:
                break
            run.redrawn += 1
        else:
            raise RuntimeError(f"no batch without near-ties in {most_tries} tries at step {step}")
        run.smallest_gap = min(run.smallest_gap, scout.smallest_gap)
        run.tokens.append(tokens.numpy())
        with recorder.watch():
            _step(state, run, step, tokens, step in gradient_steps)
        run.selections.append(recorder.take())
        run.routings.append(recorder.take_routing())
    run.final = pieces(state, lambda parameter: parameter)
    return run
