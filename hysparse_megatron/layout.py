"""The layout language: one string that says what every layer of a model is.

    layout  = item+
    item    = layer | "|" | group | count "*" (layer | group)
    group   = "(" item+ ")"
    layer   = "F" full attention, the oracle | "S" sparse | "W" sliding window only

Spaces mean nothing. `4*(F 11*S) F` is 49 layers with oracles at 0, 12, 24, 36 and 48. A `|`
forces a pipeline cut before the next layer, also inside a repeat: `2*(F S | S) F` has two cuts.
A sparse layer reads the nearest full layer before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import inf

from hysparse_megatron.errors import ConfigError

MAX_LAYERS = 1024
"""Longest layout accepted; far above any real model, so that a slip of a digit is an error."""


class LayerKind(Enum):
    """What a layer's attention is; the value is its letter in a layout."""

    FULL = "F"
    SPARSE = "S"
    WINDOW = "W"


DEFAULT_COSTS = {LayerKind.FULL: 2.0, LayerKind.SPARSE: 1.5, LayerKind.WINDOW: 1.0}
"""Rough relative time of one layer, used to balance stages when no measured costs are given."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its kind, and for a sparse layer the index of the full layer it reads."""

    kind: LayerKind
    oracle: int | None = None


@dataclass(frozen=True)
class Layout:
    """A parsed layout. `cuts` are the layer indices before which a forced pipeline cut stands."""

    text: str
    layers: tuple[LayerPlan, ...]
    cuts: tuple[int, ...] = ()
    cut_positions: tuple[int, ...] = field(default=(), repr=False, compare=False)
    """Where in `text` each cut was written, for error messages."""

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return len(self.layers)


class LayoutError(ConfigError):
    """A layout that cannot be read or cut. `position` is the offending character in `text`."""

    text: str = ""
    position: int = 0

    @classmethod
    def at(cls, text: str, position: int, message: str) -> "LayoutError":
        """The error `message` with the layout and a caret under the character at `position`."""
        one_line = "".join(" " if character.isspace() else character for character in text)
        error = cls(f"{message}\n  {one_line}\n  {' ' * position}^")
        error.text, error.position = text, position
        return error


@dataclass(frozen=True)
class _Symbol:
    letter: str
    position: int


@dataclass
class _Group:
    """An open parenthesis, or the whole layout: what it holds and how often it repeats."""

    repeat: int
    position: int
    symbols: list[_Symbol] = field(default_factory=list)


def parse_layout(text: str) -> Layout:
    """Read a layout. Raises `LayoutError` that points at the first character that is wrong."""
    layers: list[LayerPlan] = []
    cuts: list[int] = []
    cut_positions: list[int] = []
    oracle: int | None = None
    for symbol in _expand(text):
        if symbol.letter == "|":
            if not layers:
                raise LayoutError.at(text, symbol.position, "a cut before the first layer")
            if cuts and cuts[-1] == len(layers):
                raise LayoutError.at(text, symbol.position, "two cuts in one place")
            cuts.append(len(layers))
            cut_positions.append(symbol.position)
            continue
        kind = LayerKind(symbol.letter)
        if kind is LayerKind.SPARSE and oracle is None:
            message = "a sparse layer S before any full layer F: it has no oracle to read"
            raise LayoutError.at(text, symbol.position, message)
        if kind is LayerKind.FULL:
            oracle = len(layers)
        layers.append(LayerPlan(kind, oracle if kind is LayerKind.SPARSE else None))
    if not layers:
        raise LayoutError.at(text, 0, "an empty layout: name at least one layer")
    if cuts and cuts[-1] == len(layers):
        raise LayoutError.at(text, cut_positions[-1], "a cut after the last layer")
    return Layout(text, tuple(layers), tuple(cuts), tuple(cut_positions))


def _expand(text: str) -> list[_Symbol]:
    """Letters and cuts in model order, with repeats and parentheses written out."""
    open_groups = [_Group(repeat=1, position=0)]
    position = 0
    while position < len(text):
        character = text[position]
        if character.isspace():
            position += 1
            continue
        repeat, start = 1, position
        if character in "0123456789*":
            repeat, position = _read_repeat(text, position)
            character = text[position]
        if character == "(":
            open_groups.append(_Group(repeat, start))
        elif character == ")":
            _close_group(text, position, open_groups)
        elif character == "|":
            open_groups[-1].symbols.append(_Symbol("|", position))
        elif character in "FSW":
            body = [_Symbol(character, position)]
            open_groups[-1].symbols += _repeated(text, start, body, repeat)
        else:
            message = f"unknown layer {character!r}: use F (full), S (sparse) or W (window)"
            raise LayoutError.at(text, position, message)
        position += 1
    if len(open_groups) > 1:
        opened = text.index("(", open_groups[-1].position)
        raise LayoutError.at(text, opened, "this parenthesis is never closed")
    return _repeated(text, 0, open_groups[0].symbols, 1)


def _read_repeat(text: str, start: int) -> tuple[int, int]:
    """The count of a `count *` at `start`, and where the layer or group it repeats begins."""
    position = start
    while position < len(text) and text[position] in "0123456789":
        position += 1
    digits = text[start:position]
    if not digits:
        raise LayoutError.at(text, start, "no count before '*': write for instance 3*S")
    if len(digits) > len(str(MAX_LAYERS)):
        raise LayoutError.at(text, start, f"repeat too large: at most {MAX_LAYERS} layers")
    if int(digits) == 0:
        raise LayoutError.at(text, start, "a repeat of zero: leave the part out instead")
    position = _skip_spaces(text, position)
    if position == len(text) or text[position] != "*":
        message = f"no '*' after the count {digits}: write for instance {digits}*S"
        raise LayoutError.at(text, start if position == len(text) else position, message)
    body = _skip_spaces(text, position + 1)
    if body == len(text) or text[body] in ")|*0123456789":
        message = f"nothing to repeat after {digits}*: write a layer or a parenthesis"
        raise LayoutError.at(text, position if body == len(text) else body, message)
    return int(digits), body


def _skip_spaces(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _close_group(text: str, position: int, open_groups: list[_Group]) -> None:
    if len(open_groups) == 1:
        raise LayoutError.at(text, position, "this parenthesis was never opened")
    group = open_groups.pop()
    if not group.symbols:
        raise LayoutError.at(text, position, "empty parentheses: name at least one layer")
    open_groups[-1].symbols += _repeated(text, group.position, group.symbols, group.repeat)


def _repeated(text: str, position: int, symbols: list[_Symbol], repeat: int) -> list[_Symbol]:
    if len(symbols) * repeat > 2 * MAX_LAYERS:
        raise LayoutError.at(text, position, f"repeat too large: at most {MAX_LAYERS} layers")
    if sum(symbol.letter != "|" for symbol in symbols) * repeat > MAX_LAYERS:
        raise LayoutError.at(text, position, f"repeat too large: at most {MAX_LAYERS} layers")
    return symbols * repeat


def live_oracle(layout: Layout, layer_index: int) -> int | None:
    """The oracle whose key, value and indices must cross a cut before `layer_index`, if any."""
    for plan in layout.layers[layer_index:]:
        if plan.kind is LayerKind.FULL:
            return None
        if plan.oracle is not None:
            return plan.oracle if plan.oracle < layer_index else None
    return None


def check_stages(layout: Layout, num_stages: int) -> None:
    """Raise `LayoutError` unless the layout, with its forced cuts, can fill `num_stages`."""
    if num_stages > layout.num_layers:
        message = f"{layout.num_layers} layers cannot fill {num_stages} pipeline stages"
        raise LayoutError.at(layout.text, max(len(layout.text.rstrip()) - 1, 0), message)
    if len(layout.cuts) > num_stages - 1:
        position = layout.cut_positions[num_stages - 1] if layout.cut_positions else 0
        message = f"{len(layout.cuts)} cuts, but {num_stages} pipeline stages take at most "
        raise LayoutError.at(layout.text, position, f"{message}{num_stages - 1}")


def stage_layers(
    layout: Layout, num_stages: int, costs: Sequence[float] | None = None
) -> tuple[range, ...]:
    """Split the layers into `num_stages` contiguous stages (pp * vpp of them, in model order).

    Forced cuts are kept; the others are chosen so that the most expensive stage costs as little
    as possible, then so that the fewest cuts fall inside a hybrid block (those must send key,
    value and indices), then so that the stages are as even as possible. `costs` holds one
    relative cost per layer, at least 0; without it `DEFAULT_COSTS` apply.
    """
    if num_stages < 1:
        raise ValueError(f"num_stages must be at least 1, got {num_stages}")
    if costs is None:
        costs = [DEFAULT_COSTS[plan.kind] for plan in layout.layers]
    if len(costs) != layout.num_layers or not all(0 <= cost < inf for cost in costs):
        raise ValueError(f"need {layout.num_layers} finite costs of at least 0, got {costs}")
    check_stages(layout, num_stages)
    return _balance(layout, num_stages, costs)


def _balance(layout: Layout, num_stages: int, costs: Sequence[float]) -> tuple[range, ...]:
    """Exact dynamic programme over (stages used, layers used), in two passes."""
    num_layers = layout.num_layers
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    # A stage that ends before layer `end` starts at or after the last forced cut before it.
    earliest = [
        max((cut for cut in layout.cuts if cut < end), default=0)
        for end in range(1, 1 + num_layers)
    ]
    limit = _smallest_maximum(num_stages, prefix, earliest) * (1 + 1e-9)
    inside = [live_oracle(layout, index) is not None for index in range(num_layers)]

    # best[end]: (cuts inside a block, sum of squared stage costs) of the cheapest split.
    nothing = (num_layers + 1, inf)
    best: list[tuple[int, float]] = [(0, 0.0)] + [nothing] * num_layers
    starts: list[list[int]] = []
    for _ in range(num_stages):
        following = [nothing] * (num_layers + 1)
        chosen = [-1] * (num_layers + 1)
        for end in range(1, num_layers + 1):
            for start in range(end - 1, earliest[end - 1] - 1, -1):
                cost = prefix[end] - prefix[start]
                if cost > limit:
                    break
                crossings = best[start][0] + (inside[start] if start else 0)
                candidate = (crossings, best[start][1] + cost * cost)
                if candidate < following[end]:
                    following[end], chosen[end] = candidate, start
        best = following
        starts.append(chosen)

    stages: list[range] = []
    end = num_layers
    for chosen in reversed(starts):
        stages.append(range(chosen[end], end))
        end = chosen[end]
    return tuple(reversed(stages))


def _smallest_maximum(num_stages: int, prefix: list[float], earliest: list[int]) -> float:
    """The cost of the most expensive stage in the split that makes it as small as possible."""
    num_layers = len(prefix) - 1
    best = [0.0] + [inf] * num_layers
    for _ in range(num_stages):
        following = [inf] * (num_layers + 1)
        for end in range(1, num_layers + 1):
            for start in range(end - 1, earliest[end - 1] - 1, -1):
                cost = prefix[end] - prefix[start]
                if cost >= following[end]:
                    break
                following[end] = min(following[end], max(cost, best[start]))
        best = following
    return best[num_layers]
