"""What one rank does in the tests of the probe; runs inside a worker of `pool.py`."""

import numpy as np
import torch

from hysparse_megatron.config.schema import Config
from hysparse_megatron.model.probe import Findings, Probe
from hysparse_megatron.training.state import TrainingState
from hysparse_megatron.training.step import evaluate
from tests.distributed.cases import random_tokens
from tests.distributed.ranks import SelectionRecorder, prepare, share_of


def draw(rank: int, config: Config, seed: int, least_gap: float, most_tries: int) -> np.ndarray:
    """A global batch without near-ties of selections, on one process: tokens [sequences, S + 1]."""
    state = _prepare(config)
    for attempt in range(most_tries):
        tokens = random_tokens(seed, attempt, sequences=config.train.global_batch_size)
        scout = SelectionRecorder(measure_gaps=True)
        with scout.watch():
            evaluate(state, [share_of(state, tokens)])
        if scout.smallest_gap >= least_gap:
            return tokens.numpy()
    raise RuntimeError(f"no batch without near-ties in {most_tries} tries")


def observe(rank: int, config: Config, tokens: np.ndarray) -> tuple[Findings, float, float]:
    """What a probe finds in an evaluation, and the evaluation's loss with and without it."""
    state = _prepare(config)
    share = share_of(state, torch.from_numpy(tokens))
    sequence = config.train.seq_length
    probe = Probe(state.chunks, state.megatron, state.groups, sequence, state.device)
    with probe.watching():
        watched = evaluate(state, [share, share[::-1]])
    found = probe.gather()
    alone = evaluate(state, [share, share[::-1]])
    assert watched is not None
    assert alone is not None
    return found, watched.loss, alone.loss


def _prepare(config: Config) -> TrainingState:
    """A model whose sinks differ from head to head, the same on every layout."""
    state = prepare(config)
    heads = config.model.num_attention_heads // state.groups.tp.size()
    first = heads * state.groups.tp.rank()
    for chunk in state.chunks:
        for name, parameter in chunk.module.named_parameters():
            if name.endswith("_sink"):
                with torch.no_grad():
                    parameter.copy_(torch.arange(first, first + heads) / 3)
    return state
