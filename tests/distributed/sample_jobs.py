"""What one rank does in the test of written texts; runs inside a worker of `pool.py`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hysparse_megatron.config.schema import Config
from hysparse_megatron.training.sample import Prompt, TextSample
from hysparse_megatron.training.state import TrainingState
from hysparse_megatron.training.step import evaluate
from tests.distributed.cases import VOCAB, random_tokens
from tests.distributed.ranks import SelectionRecorder, prepare, share_of

NEW = 6
"""Tokens that are written."""


@dataclass
class Written:
    """A text of numbers, and by how little it could have been another one."""

    prompt: list[int]
    text: str
    smallest_gap: float


class _Measured(TextSample):
    """Knows the smallest distance of a chosen token to the next best."""

    smallest_gap = float("inf")

    def _likeliest(self, is_last: Tensor, logits: Tensor, non_loss_data: bool) -> Tensor:
        first, second = logits[0, is_last].flatten()[:VOCAB].topk(2).values
        self.smallest_gap = min(self.smallest_gap, float(first - second))
        return super()._likeliest(is_last, logits, non_loss_data)


def draw_text(rank: int, config: Config, seed: int, least_gap: float, most_tries: int) -> Written:
    """On one process: a prompt whose continuation no rounding changes, and that."""
    state = prepare(config)
    for attempt in range(most_tries):
        tokens = random_tokens(seed, 7, attempt, sequences=1)[0].tolist()
        scout = SelectionRecorder(measure_gaps=True)
        with scout.watch():
            sample = _of(state, tokens, _Measured)
            text = _write(state, sample)
        if min(scout.smallest_gap, sample.smallest_gap) >= least_gap:
            return Written(tokens, text, min(scout.smallest_gap, sample.smallest_gap))
    raise RuntimeError(f"no prompt without near-ties in {most_tries} tries")


def write_text(
    rank: int, config: Config, prompt: list[int], batch: np.ndarray
) -> tuple[str, float, float]:
    """What a layout writes, and the loss of an evaluation before and after it."""
    state = prepare(config)
    share = share_of(state, torch.from_numpy(batch))
    before = evaluate(state, [share])
    text = _write(state, _of(state, prompt))
    after = evaluate(state, [share])
    assert before is not None
    assert after is not None
    return text, before.loss, after.loss


def _of(state: TrainingState, prompt: list[int], kind: type[Any] = TextSample) -> Any:
    def decode(ids: Any) -> str:
        return "".join(f" {token}" for token in ids)

    return kind(state, Prompt(prompt, end=VOCAB), NEW, VOCAB, decode)


def _write(state: TrainingState, sample: TextSample) -> str:
    for chunk in state.chunks:
        chunk.eval()
    return str(sample.fields()["sample"])
