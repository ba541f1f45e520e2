"""The layout language: one string that says what every layer of a model is.

    layout  = item+
    item    = layer | "|" | group | count "*" (layer | group)
    group   = "(" item+ ")"
    layer   = "F" full attention, the oracle | "S" sparse | "W" sliding window only

Spaces mean nothing. `4*(F 11*S) F` is 49 layers with oracles at 0, 12, 24, 36 and 48. A `|`
forces a pipeline cut before the next layer, also inside a repeat: `2*(F S | S) F` has two cuts.
A sparse layer reads the nearest full layer before it.
"""

from dataclasses import dataclass, field
from functools import cache, cached_property

from hysparse_megatron.architecture.layers import KINDS, LayerKind
from hysparse_megatron.errors import ConfigError

MAX_LAYERS = 1024
"""Longest layout accepted; far above any real model, so that a slip of a digit is an error."""


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

    @cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer."""
        return tuple(layer.kind for layer in self.layers)

    @cached_property
    def letters(self) -> str:
        """One letter per layer."""
        return "".join(kind.value for kind in self.kinds)

    @cached_property
    def selects(self) -> bool:
        """Whether a layer reads blocks that another one selects."""
        return any(layer.oracle is not None for layer in self.layers)


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


@cache
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
        kind = KINDS[symbol.letter]
        if kind.reads_oracle and oracle is None:
            message = (
                f"a {kind.label} layer {kind.value} before any full layer F: it has no oracle to "
                "read"
            )
            raise LayoutError.at(text, symbol.position, message)
        if kind.is_oracle:
            oracle = len(layers)
        layers.append(LayerPlan(kind, oracle if kind.reads_oracle else None))
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
        elif character in KINDS:
            body = [_Symbol(character, position)]
            open_groups[-1].symbols += _repeated(text, start, body, repeat)
        else:
            *others, last = (f"{kind.value} ({kind.label})" for kind in LayerKind)
            message = f"unknown layer {character!r}: use {', '.join(others)} or {last}"
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
