"""Which token comes next: the best one, or one drawn from the softmax at a temperature.

Shapes: A sequences of a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hysparse_megatron.runtime.random import derive_seed


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0
    """What logits are divided by; 0 takes the most likely token (greedy)."""
    top_p: float = 1.0
    """Draw among the fewest most likely tokens whose probabilities reach this sum (nucleus)."""
    seed: int = 0


class Sampler:
    """Chooses tokens for numbered sequences.

    What a sequence draws depends on the seed, its number and its own logits: not on which others
    are in the batch, or for how long.
    """

    def __init__(self, sampling: Sampling, vocab_size: int, holes: Collection[int] = ()) -> None:
        """Logits of padding from `vocab_size` on are never chosen, nor ids in `holes` below it."""
        self._sampling = sampling
        self._vocab_size = vocab_size
        self._holes = torch.tensor([i for i in holes if i < vocab_size], dtype=torch.int64)
        self._streams: dict[int, torch.Generator] = {}

    def choose(self, logits: Tensor, numbers: Sequence[int]) -> Tensor:
        """One token id int64 [A] for sequences `numbers` by their logits [A, V]."""
        logits = logits[:, : self._vocab_size].double()
        if len(self._holes):
            logits = logits.index_fill(-1, self._holes.to(logits.device), -torch.inf)
        if self._sampling.temperature == 0:
            return logits.argmax(-1)
        # The largest is 0 then, and stays it however small the temperature is.
        logits = logits - logits.amax(-1, keepdim=True)
        probability = torch.softmax(logits / self._sampling.temperature, dim=-1)
        ordered, ids = probability.sort(dim=-1, descending=True, stable=True)
        reached = ordered.cumsum(-1)
        # A token stays while those before it have not reached the sum: so at least one does.
        nucleus = ordered.masked_fill(reached - ordered >= self._sampling.top_p, 0.0)
        reached = nucleus.cumsum(-1)
        draws = torch.tensor([self._draw(number) for number in numbers], device=logits.device)
        place = (reached <= draws.unsqueeze(1) * reached[:, -1:]).sum(-1, keepdim=True)
        # Rounding could step past the last that stays.
        place = place.minimum((nucleus > 0).sum(-1, keepdim=True) - 1)
        return ids.gather(-1, place).squeeze(-1)

    def _draw(self, number: int) -> float:
        """The sequence's next number, uniform in [0, 1)."""
        if number not in self._streams:
            seed = derive_seed(self._sampling.seed, "sequence", number)
            self._streams[number] = torch.Generator().manual_seed(seed)
        return float(torch.rand((), generator=self._streams[number], dtype=torch.float64))
