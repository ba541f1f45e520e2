"""One model computed twice: all tokens at once as in training, and step by step with a cache.

Shapes: B sequences, S tokens of one, V padded vocabulary, HKV KV groups, K selected.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.config.schema import Config
from hysparse_megatron.inference.forward import advance, logits_of
from hysparse_megatron.inference.kv_cache import KvCache
from hysparse_megatron.model import attend_cached
from tests.distributed.ranks import SelectionRecorder
from tests.unit.model import rounding
from tests.unit.model.tiny_models import randomize, tiny_config, tiny_model

LEAST_GAP = 1e-4
"""In log score and router logit: far above what the order of additions moves either by."""
MOST_TRIES = 50


def random_model(
    overrides: list[str], groups: ProcessGroupCollection, seed: int
) -> tuple[Config, HybridModel]:
    """A tiny model in evaluation mode, with weights of any size, and its configuration."""
    config = tiny_config(*overrides)
    model = tiny_model(config, groups)
    torch.manual_seed(seed)  # initial weights come from a stream of their own
    randomize(model)
    model.eval()
    return config, model


@dataclass
class Computed:
    """Of one sequence: logits [S, V], and the selection [HKV, S, K] of every oracle in order."""

    logits: Tensor
    selections: list[Tensor]
    gap: float = float("inf")
    """Of the choice that comes nearest to a tie, of blocks or experts."""
    moved: float = 0.0
    """By how much of the largest logit some logit moves where each weight does by its rounding."""

    @property
    def allowed(self) -> float:
        """By how much of the largest logit one may be off."""
        return rounding.allowed(self.moved)


def at_once(model: HybridModel, tokens: Tensor) -> Computed:
    """The forward pass of training, without dropout, of tokens [S]."""
    recorder = SelectionRecorder(measure_gaps=True)
    positions = torch.arange(len(tokens)).unsqueeze(0)
    with torch.no_grad(), recorder.watch():
        logits = model(tokens.unsqueeze(0), positions, None, runtime_gather_output=True)
    made = recorder.take()
    selections = [torch.from_numpy(made[layer][0, 0]) for layer in sorted(made)]
    return Computed(logits[0].float(), selections, recorder.smallest_gap)


def without_near_ties(
    model: HybridModel, lengths: Sequence[int], vocabulary: int
) -> tuple[list[Tensor], list[Computed]]:
    """Random sequences whose selections rounding cannot change, and what they come to."""
    sequences, computed = [], []
    for length in lengths:
        for _ in range(MOST_TRIES):
            tokens = torch.randint(0, vocabulary, (length,))
            found = at_once(model, tokens)
            if found.gap >= LEAST_GAP:
                break
        else:
            raise AssertionError(f"no {length} tokens without near-ties in {MOST_TRIES} tries")
        _measure_rounding(model, tokens, found)
        sequences.append(tokens)
        computed.append(found)
    return sequences, computed


def _measure_rounding(model: HybridModel, tokens: Tensor, found: Computed) -> None:
    found.moved = rounding.moved_by_rounding(
        model, lambda: at_once(model, tokens).logits, found.logits
    )


def make_cache(config: Config, capacities: Sequence[int], **other: Any) -> KvCache:
    """A cache in the precision of the tests' models, in which unwritten memory would be seen."""
    kinds = parse_layout(config.model.layout).kinds
    options = {"full_dtype": torch.float32, "window_dtype": torch.float32, "device": "cpu"}
    cache = KvCache(config.model, kinds, capacities, **{**options, **other})
    poison(cache)
    return cache


def poison(cache: KvCache) -> None:
    """NaN everywhere."""
    for layer in cache.layers:
        for tensor in layer.tensors:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 127)


@dataclass
class _Recorder:
    """Keeps the selections of a step, by oracle, in the order of layers."""

    made: list[Tensor] = field(default_factory=list)

    def watching(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            if result.block_indices is not None:
                self.made.append(result.block_indices)
            return result

        return recorded


def step_by_step(
    model: HybridModel,
    cache: KvCache,
    sequences: Sequence[Tensor],
    prompts: Sequence[int],
    chunk: int,
) -> list[Computed]:
    """The first `prompts[i]` tokens in chunks, then all sequences token by token to their ends."""
    logits: list[list[Tensor]] = [[] for _ in sequences]
    selections: list[list[list[Tensor]]] = [[] for _ in sequences]
    recorder = _Recorder()
    patched = recorder.watching(attend_cached.cached_full_attention)

    def take(rows: list[int], counts: list[int]) -> None:
        past = [cache.lengths[row] for row in rows]
        given = [
            sequences[row][start : start + count].tolist()
            for row, start, count in zip(rows, past, counts, strict=True)
        ]
        recorder.made.clear()
        hidden = advance(model, cache, rows, given)
        every = logits_of(model, hidden)
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            logits[row].append(every[:count, i])
            selections[row].append([made[i, :, :count] for made in recorder.made])

    with mock.patch.object(attend_cached, "cached_full_attention", patched):
        while True:
            left = [min(chunk, prompt - cache.lengths[row]) for row, prompt in enumerate(prompts)]
            rows = [row for row, count in enumerate(left) if count > 0]
            if not rows:
                break
            take(rows, [left[row] for row in rows])
        while True:
            rows = [row for row, all_of in enumerate(sequences) if cache.lengths[row] < len(all_of)]
            if not rows:
                break
            take(rows, [1] * len(rows))
    return [
        Computed(
            torch.cat(of_row), [torch.cat(of_layer, dim=1) for of_layer in zip(*picks, strict=True)]
        )
        for of_row, picks in zip(logits, selections, strict=True)
    ]


def assert_equal(found: Sequence[Computed], expected: Sequence[Computed]) -> None:
    """Equal selections, and logits as `assert_close` says."""
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours.selections) == len(theirs.selections)
        for mine, wanted in zip(ours.selections, theirs.selections, strict=True):
            assert torch.equal(mine, wanted)
        assert_close(ours.logits, theirs)


def assert_close(logits: Tensor, expected: Computed) -> None:
    """The logits of the last tokens, [some, V]."""
    largest, wanted = expected.logits.abs().max(), expected.logits[-len(logits) :]
    error, allowed = (logits - wanted).abs().max() / largest, expected.allowed
    assert error <= allowed, f"logits are off by {error:.1e} of the largest, not {allowed:.1e}"
