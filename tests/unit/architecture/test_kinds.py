"""Kinds of layers, gates and sinks: added in one file, and refused where one is not handled."""

import dataclasses
import os
import shutil
import sys
from pathlib import Path

import pytest

import hysparse_megatron
from hysparse_megatron.architecture.layers import KINDS, AttentionLayer, LayerKind
from hysparse_megatron.config.compose import compose
from tests.captured import captured, import_path

CHECKOUT = Path(hysparse_megatron.__file__).parents[1]

LAYERS = [
    (
        "    _value_: str\n",
        '    GATED = "G", "gated window", (Branch.WINDOW,), 1.0\n\n    _value_: str\n',
    ),
    (
        "            case LayerKind.WINDOW:\n",
        "            case LayerKind.GATED:\n"
        '                return self._gates(self.sizes.gate, "ring_gate")\n'
        "            case LayerKind.WINDOW:\n",
    ),
    (
        '    head = "head"\n    channel = "channel"\n',
        '    head = "head"\n    channel = "channel"\n    pair = "pair"\n',
    ),
    (
        "            case GateKind.channel |",
        "            case GateKind.pair:\n"
        "                width = self.sizes.value_dim // 2\n"
        "            case GateKind.channel |",
    ),
    ('    shared = "shared"\n', '    shared = "shared"\n    window = "window"\n'),
    (
        "            case SinkKind.shared:\n",
        "            case SinkKind.window:\n"
        '                return ("window_sink",)\n'
        "            case SinkKind.shared:\n",
    ),
]
"""What a letter G, one gate for two channels, and a sink of windows alone are: in one file."""

BODY = [
    ("import LayerKind\n", "import GateKind, LayerKind, SinkKind\n"),
    (
        "        sinks = self._sinks()\n",
        "        sinks = self._sinks()\n"
        "        if self.config.architecture.sink is SinkKind.window:\n"
        "            sinks = [None, *sinks]\n"
        "        gates = (paired(self, gates[0]), paired(self, gates[1]))\n",
    ),
    (
        "ATTENTION = {\n",
        """def paired(layer, gate):
    if layer.config.architecture.gate is GateKind.pair:
        return gate.repeat_interleave(2, dim=-1)
    return gate


class GatedWindowAttention(BaseAttention):
    def _attend(self, own, parts, shared, attend):
        attention = attend.window(self.index, own, self._sinks()[0])
        gate = torch.sigmoid(paired(self, parts["ring_gate"]).transpose(0, 1).float())
        return (gate * attention).to(attention.dtype), shared


ATTENTION = {
    LayerKind.GATED: GatedWindowAttention,
""",
    ),
]
"""And what they compute."""


@pytest.mark.thorough
def test_new_kinds_are_added_in_one_file_and_the_attention_body(tmp_path: Path) -> None:
    package = tmp_path / "hysparse_megatron"
    shutil.copytree(CHECKOUT / "hysparse_megatron", package)
    (tmp_path / "conf").symlink_to(CHECKOUT / "conf")
    for name, changes in {"architecture/layers.py": LAYERS, "model/attention.py": BODY}.items():
        text = (package / name).read_text()
        for before, after in changes:
            assert before in text, before
            text = text.replace(before, after, 1)
        (package / name).write_text(text)
    done = captured(
        [sys.executable, "-m", "tests.unit.architecture.new_kinds"],
        env={**os.environ, "PYTHONPATH": import_path(tmp_path, CHECKOUT, CHECKOUT / "kernels")},
        cwd=tmp_path,
        timeout=300,
    )
    assert done.stdout.endswith("done\n"), done.stderr


@pytest.mark.parametrize(("setting", "kind"), [("gate", "S"), ("full_gate", "F"), ("sink", "W")])
def test_a_kind_that_is_not_handled_is_an_error_and_no_default(setting: str, kind: str) -> None:
    layer = compose([]).model.attention(KINDS[kind])
    sizes = dataclasses.replace(layer.sizes, **{setting: "third"})  # type: ignore[arg-type]
    unhandled = dataclasses.replace(layer, sizes=sizes)
    with pytest.raises(AssertionError, match="third"):
        _ = unhandled.num_matrix_parameters + unhandled.num_vector_parameters


def test_letters_are_those_of_the_layout() -> None:
    assert {letter: kind.label for letter, kind in KINDS.items()} == {
        "F": "full",
        "S": "sparse",
        "W": "window",
    }
    assert [kind for kind in LayerKind if kind.is_oracle] == [LayerKind.FULL]
    assert [kind for kind in LayerKind if kind.reads_oracle] == [LayerKind.SPARSE]
    assert isinstance(compose([]).model.attention(LayerKind.FULL), AttentionLayer)
