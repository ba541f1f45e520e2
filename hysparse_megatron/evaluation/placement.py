"""Which layers of a model with full attention should stay full, by held-out loss.

Layers differ in how much they need of what is far away, and a hybrid layout keeps a few full. The
first one has to be: what is sparse reads an oracle before it. Each further one is chosen greedily:
the layer that, made full again beside those chosen before, lowers the loss most while all others
see a window alone. A sparse branch can make up for much of the rest, but only by training.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.data.read.held_out import EvaluationBatches
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.evaluation.held_out import token_losses
from hysparse_megatron.evaluation.positions import loss_by_position
from hysparse_megatron.inference.load import LoadedModel
from hysparse_megatron.model.attend import TrainingAttend
from hysparse_megatron.model.stack import attending_with
from hysparse_megatron.runtime.agreement import on_rank_zero


@dataclass(frozen=True)
class Choice:
    """One layer chosen, and what else there was."""

    layer: int
    """Counted from 0."""
    losses: dict[int, float]
    """Held-out loss in nats with this layer full beside those chosen before, by layer; of all
    layers not chosen yet."""


def require_windows(layout: str) -> None:
    """Raise ConfigError unless all layers see a window alone."""
    letters = parse_layout(layout).letters
    others = set(letters) - {LayerKind.WINDOW.value}
    if others:
        raise ConfigError(
            f"the model has layers of kind {', '.join(sorted(others))}; allowed is W alone: "
            f'adopt the original with --layout "{len(letters)}*W" and the window wanted'
        )


class Placement:
    """A model of window layers, some of which see everything for the moment.

    Args:
        loaded: a model that has window layers alone.
        batches: held-out sequences.
        length: tokens of each.
        note: told before every run of the model, in one line.

    Raises:
        ConfigError: the model has other layers.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        batches: EvaluationBatches,
        length: int,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        require_windows(loaded.config.model.layout)
        self._loaded = loaded
        self._batches = batches
        self._length = length
        self._note = note

    def loss(self, full: Sequence[int]) -> float:
        """Held-out loss in nats per token when the layers `full` see everything."""
        widened = functools.partial(_Widened, full_layers=frozenset(full), length=self._length)
        with attending_with([self._loaded.model], widened):
            whole, _ = loss_by_position(token_losses(self._loaded, self._batches), num_bins=1)
        return whole.loss

    def choose(self, count: int) -> Iterator[Choice]:
        """The layers that stay full beside layer 0, so that there are `count`; best first.

        Runs the model once for every layer not chosen yet and choice. Collective.
        """
        chosen = [0]
        for _ in range(count - 1):
            left = [n for n in range(len(self._loaded.kinds)) if n not in chosen]
            losses = {}
            for layer in left:
                self._note(f"choice {len(chosen)} of {count - 1}: layer {layer}")
                losses[layer] = self.loss([*chosen, layer])
            # Of rank 0: others may differ in the last bit, and all have to go on alike.
            best = on_rank_zero(functools.partial(min, losses, key=losses.get), ConfigError)
            chosen.append(best)
            yield Choice(best, losses)


@dataclass(frozen=True, kw_only=True)
class _Widened(TrainingAttend):
    """Attends with a window of `length` tokens in the layers `full_layers`."""

    full_layers: frozenset[int]
    length: int

    def window_of(self, layer: int) -> int:
        return self.length if layer in self.full_layers else super().window_of(layer)


def layout_of(full: Sequence[int], num_layers: int) -> str:
    """The layout with the layers `full`, all others sparse, in the layout language."""
    kinds = ("F" if layer in full else "S" for layer in range(num_layers))
    runs = [(letter, len(list(run))) for letter, run in itertools.groupby(kinds)]
    return " ".join(letter if length == 1 else f"{length}*{letter}" for letter, length in runs)
