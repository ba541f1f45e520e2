"""An exported model is the model: the same logits, in transformers."""

import json
from pathlib import Path

import pytest
import torch

from hysparse_megatron.architecture.layers import KINDS, FullGate, GateKind, SinkKind
from hysparse_megatron.huggingface.configuration_hysparse import _ALLOWED, HySparseConfig
from hysparse_megatron.huggingface.settings import EXPORTED, from_json
from tests.unit.huggingface.exports import IDS, MOE, assert_logits, load, saved_run
from tests.unit.model.tiny_models import SEQUENCE
from tests.unit.model.tiny_models import VARIANTS as ATTENTION

pytestmark = pytest.mark.usefixtures("seed", "group")

VARIANTS: dict[str, list[str]] = {
    **ATTENTION,
    "gated full layers": ["model.layout=F S F", "model.full_gate=head"],
    "full layers gated by channel, narrow values": [
        "model.layout=F S F",
        "model.full_gate=channel",
        "model.value_head_dim=3",
    ],
    "biases and gated full layers": [
        "model.layout=F S W F",
        "model.qkv_bias=true",
        "model.full_gate=head",
    ],
    "forced blocks": [
        "model.layout=F S F",
        "model.num_selected_blocks=3",
        "model.forced_first_blocks=1",
        "model.forced_recent_blocks=1",
    ],
    "a third of the channels, as a decimal": [
        "model.layout=F S F",
        "model.head_dim=12",
        "model.rotary_fraction=0.333333333",
    ],
    "frequencies divided": [
        "model.layout=F S F",
        "model.rope_scaling.type=linear",
        "model.rope_scaling.factor=3",
    ],
    "frequencies as in Llama 3.1": [
        "model.layout=F S W F",
        "model.rope_scaling.type=llama3",
        "model.rope_scaling.factor=5",
        "model.rope_scaling.original_max_position_embeddings=7",
    ],
    "YaRN of a part of the channels": [
        "model.layout=F S W F",
        "model.head_dim=20",
        "model.rotary_fraction=0.6",
        "model.rope_scaling.type=yarn",
        "model.rope_scaling.factor=4",
        "model.rope_scaling.original_max_position_embeddings=7",
        "model.rope_scaling.beta_fast=2.5",
        "model.rope_scaling.truncate=false",
    ],
    "a window of one token": ["model.layout=F S W F", "model.window=1"],
    "experts": ["model.layout=F S S W F", *MOE],
    "experts by softmax": [
        "model.layout=F S F",
        "model.moe.num_experts=4",
        "model.moe.num_active_experts=2",
    ],
}


YARN = {"factor": 3.0, "original_max_position_embeddings": 9}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_lines_of_a_model_card_count(key: str, tmp_path: Path) -> None:
    """Added to an exported folder they scale its frequencies, and those of what is imported."""
    wanted = [f"model.rope_scaling.{name}={value}" for name, value in YARN.items()]
    wanted += ["model.rotary_base=500", "model.rotary_fraction=0.5"]
    with saved_run(
        tmp_path / "run", "model.layout=F", "model.rope_scaling.type=yarn", *wanted
    ) as run:
        tokens = torch.randint(0, IDS, (2, SEQUENCE))
        ours = run.logits(tokens)
        folder = run.export(tmp_path / "exported")
    path = folder / "config.json"
    described = json.loads(path.read_text())
    plain = {"rope_type": "default", "rope_theta": 500, "partial_rotary_factor": 0.5}
    described["rope_parameters"] = plain
    described[key] = (plain if key == "rope_parameters" else {}) | {"rope_type": "yarn", **YARN}
    path.write_text(json.dumps(described))
    assert_logits(ours, load(folder), tokens)
    imported, model = from_json(described), run.config.model
    for name in ("rotary_base", "rotary_fraction", "rope_scaling"):
        assert getattr(imported, name) == getattr(model, name)


def test_frequencies_that_change_with_the_text_are_refused() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(ValueError, match="rope_type: got 'dynamic'"):
        HySparseConfig(rope_scaling=dynamic)


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_are_equal(overrides: list[str], tmp_path: Path) -> None:
    with saved_run(tmp_path / "run", *overrides) as run:
        tokens = run.clear_tokens()
        assert_logits(run.logits(tokens), load(run.export(tmp_path / "exported")), tokens)


def test_what_is_exported_is_what_the_modeling_file_computes() -> None:
    assert EXPORTED["layout"] == tuple(KINDS)
    for name, kinds in {"gate": GateKind, "sink": SinkKind, "full_gate": FullGate}.items():
        assert EXPORTED[name] == _ALLOWED[name]
        assert set(EXPORTED[name]) == {kind.value for kind in kinds}
