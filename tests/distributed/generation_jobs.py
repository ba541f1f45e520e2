"""What one rank does in the tests of generation; runs inside a worker, like `ranks.py`.

Shapes: S tokens of a sequence, V padded vocabulary, HKV KV groups on the rank, K selected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hysparse_megatron.checkpoint.saver import Saver
from hysparse_megatron.config.frozen import freeze
from hysparse_megatron.config.schema import Config
from hysparse_megatron.inference.generate import Settings, generate
from hysparse_megatron.inference.load import LoadedModel, inference_config, load_model
from hysparse_megatron.inference.report import report
from hysparse_megatron.inference.sampling import Sampling
from hysparse_megatron.runtime import megatron_on_cpu
from tests.distributed.cases import VOCAB
from tests.distributed.ranks import prepare
from tests.unit.inference.incremental import (
    LEAST_GAP,
    MOST_TRIES,
    Computed,
    at_once,
    make_cache,
    step_by_step,
    without_near_ties,
)

NEW_TOKENS = 12


@dataclass
class Sequences:
    """Token ids of some sequences, and by sequence logits [S, V], by how much of the largest each
    may be off, and selections [HKV, S, K]."""

    tokens: list[np.ndarray]
    logits: list[np.ndarray]
    allowed: list[float]
    selections: list[list[np.ndarray]]

    @classmethod
    def of(cls, tokens: Sequence[torch.Tensor], computed: Sequence[Computed]) -> Sequences:
        """Without tensors, which do not travel."""
        return cls(
            [of_one.numpy() for of_one in tokens],
            [of_one.logits.numpy() for of_one in computed],
            [of_one.allowed for of_one in computed],
            [[picks.numpy() for picks in of_one.selections] for of_one in computed],
        )


def save_run(rank: int, config: Config, run_dir: Path) -> None:
    """What a run leaves that has made no step: its settings and a checkpoint."""
    state = prepare(config)
    if rank == 0:
        freeze(config, run_dir)
    facts = {"data": {"vocab_size": VOCAB}}
    saver = Saver(state, run_dir / "checkpoints", lambda *_: facts, print, lambda *_: None)
    saver.save(1, {})
    saver.finish()


def _load(run_dir: Path) -> LoadedModel:
    megatron_on_cpu.install()
    torch.set_num_threads(1)
    config = inference_config(run_dir, torch.distributed.get_world_size())
    return load_model(config, torch.device("cpu"), run_dir, "newest")


def all_at_once(rank: int, run_dir: Path, lengths: Sequence[int], seed: int) -> Sequences:
    """Random sequences without near-ties through the forward pass of training."""
    loaded = _load(run_dir)
    torch.manual_seed(seed)
    tokens, computed = without_near_ties(loaded.model, lengths, VOCAB)
    return Sequences.of(tokens, computed)


def one_by_one(
    rank: int, run_dir: Path, tokens: Sequence[np.ndarray], prompts: Sequence[int], chunk: int
) -> Sequences:
    """The same sequences with a cache."""
    loaded = _load(run_dir)
    given = [torch.from_numpy(of_one) for of_one in tokens]
    cache = make_cache(
        loaded.config,
        [len(of_one) for of_one in given],
        tensor_parallel_size=loaded.groups.tp.size(),
    )
    return Sequences.of(given, step_by_step(loaded.model, cache, given, prompts, chunk))


def generated(
    rank: int, run_dir: Path, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> tuple[list[list[int]], str]:
    """New tokens of every prompt, and what is reported at the end."""
    return _generated(_load(run_dir), prompts, sampling)


def greedy_without_near_ties(
    rank: int, run_dir: Path, lengths: Sequence[int], seed: int
) -> tuple[list[list[int]], list[list[int]], str]:
    """Random prompts, and what `generated` gives for them; rounding can change none of it."""
    loaded = _load(run_dir)
    torch.manual_seed(seed)
    for _ in range(MOST_TRIES):
        prompts = [torch.randint(0, VOCAB, (length,)).tolist() for length in lengths]
        tokens, text = _generated(loaded, prompts, Sampling())
        if all(map(partial(_is_clear, loaded), prompts, tokens)):
            return prompts, tokens, text
    raise AssertionError(f"no prompts without near-ties in {MOST_TRIES} tries")


def _is_clear(loaded: LoadedModel, prompt: list[int], tokens: list[int]) -> bool:
    computed = at_once(loaded.model, torch.tensor(prompt + tokens[:-1]))
    best = computed.logits[len(prompt) - 1 :, : loaded.vocab_size].topk(2).values
    assert len(best) == len(tokens)
    return min(computed.gap, float((best[:, 0] - best[:, 1]).min())) >= LEAST_GAP


def _generated(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> tuple[list[list[int]], str]:
    settings = Settings(NEW_TOKENS, sampling, prefill_chunk=5)
    made = generate(loaded, prompts, settings)
    return made.tokens, report(loaded, made, settings)
