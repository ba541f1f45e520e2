"""Folders as they were found in use, each read as transformers reads it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hysparse_megatron.checkpoint import store, tensors
from hysparse_megatron.config.frozen import load_frozen
from hysparse_megatron.config.schema import Precision
from hysparse_megatron.data.tokenizer import bytes_tokenizer
from hysparse_megatron.training.state import TrainingState
from tests.unit.huggingface.adopted import logits, start
from tests.unit.huggingface.exports import IDS, assert_logits, differences, load, saved_run
from tests.unit.model.tiny_models import randomize
from tools.convert import main

pytestmark = pytest.mark.usefixtures("seed", "group")

SIZES = {
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SINGLE = "model.safetensors"
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


def saved(kind: str, folder: Path, **options: object) -> Path:
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    made = model(config(**SIZES | options))
    randomize(made, std=1.0)
    made.save_pretrained(folder)
    return folder


def test_an_export_of_mixed_types_is_loaded_in_the_widest(tmp_path: Path) -> None:
    """Whatever the embedding's type: transformers would round all others to what is declared."""
    folder = saved("llama", tmp_path / "original", vocab_size=IDS)
    bytes_tokenizer().save(str(folder / "tokenizer.json"))
    held = load_file(folder / SINGLE)
    held["model.embed_tokens.weight"] = held["model.embed_tokens.weight"].bfloat16()
    save_file(held, folder / SINGLE, metadata={"format": "pt"})
    assert adopt(folder, tmp_path / "start") == 0
    exported = tmp_path / "exported"
    assert main(["export", "--run-dir", str(tmp_path / "start"), str(exported)]) == 0
    assert json.loads((exported / "config.json").read_text())["dtype"] == "float32"
    tokens = torch.randint(0, IDS, (2, 30))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found, expected = load(exported, dtype="auto")(tokens).logits, reference(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def edit(folder: Path, *without: str, **settings: object) -> None:
    path = folder / "config.json"
    described = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({n: v for n, v in described.items() if n not in without}))


def adopt(source: Path, target: Path) -> int:
    options = ["--layout", "2*F", "--window", "8", "--block-size", "4", "--num-selected", "2"]
    return main(["adopt", str(source), str(target), *options])


def card(folder: Path) -> None:
    """The lines of a model card, added to what transformers 5 saved."""
    edit(folder, rope_scaling=YARN)


def partly(folder: Path) -> None:
    edit(folder, partial_rotary_factor=0.5)


def other_head(folder: Path) -> None:
    """After training it alone; `tie_word_embeddings` was forgotten."""
    held = load_file(folder / SINGLE)
    held["lm_head.weight"] = torch.randn_like(held["model.embed_tokens.weight"]) * 0.2
    save_file(held, folder / SINGLE, metadata={"format": "pt"})


def same_head(folder: Path) -> None:
    held = load_file(folder / SINGLE)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, folder / SINGLE, metadata={"format": "pt"})


def sharded_before(folder: Path) -> None:
    """Saved in shards, then whole: the index and a shard are from before."""
    held = {name: torch.randn_like(tensor) for name, tensor in load_file(folder / SINGLE).items()}
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file(held, folder / names[0])
    index = {"weight_map": {name: names[len(name) % 2] for name in held}}
    (folder / f"{SINGLE}.index.json").write_text(json.dumps(index))


def of_several_types(folder: Path) -> None:
    """The first of each that is stored as one is the narrowest."""
    narrow = {"q_proj": torch.bfloat16, "k_proj": torch.float16, "gate_proj": torch.bfloat16}
    held = {
        name: tensor.to(narrow.get(name.split(".")[-2], torch.float32))
        for name, tensor in load_file(folder / SINGLE).items()
    }
    save_file(held, folder / SINGLE, metadata={"format": "pt"})


CASES: dict[str, tuple[str, dict, Callable[[Path], None]]] = {
    "scaling from a model card": ("llama", {}, card),
    "a part of the channels rotated": ("llama", {}, partly),
    "tied, with another head": ("llama", {"tie_word_embeddings": True}, other_head),
    "tied, with the same head": ("llama", {"tie_word_embeddings": True}, same_head),
    "shards from before": ("mistral", {"sliding_window": None}, sharded_before),
    "several types": ("llama", {}, of_several_types),
    "the architecture's head_dim": ("qwen3", {}, lambda folder: edit(folder, "head_dim")),
    "windows from the 28th layer on": (
        "qwen3",
        {},
        lambda f: edit(f, "layer_types", use_sliding_window=True, sliding_window=4),
    ),
}


@pytest.mark.parametrize(("kind", "options", "change"), CASES.values(), ids=CASES.keys())
def test_means_what_transformers_makes_of_it(
    kind: str,
    options: dict,
    change: Callable[[Path], None],
    tmp_path: Path,
    states: list[TrainingState],
) -> None:
    source = saved(kind, tmp_path / "source", **options)
    change(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 40))
    assert adopt(source, tmp_path / "start") == 0
    found = logits(start(tmp_path / "start", states), tokens)[..., : SIZES["vocab_size"]]
    assert_logits(found, model, tokens)


def test_a_window_by_default_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers' Mistral has one where none is given."""
    source = saved("mistral", tmp_path / "source")
    edit(source, "sliding_window")
    assert adopt(source, tmp_path / "start") == 2
    assert "sliding_window 4096, transformers' value" in capsys.readouterr().err


def test_weights_keep_the_widest_type(tmp_path: Path) -> None:
    """Of what is stored as one; a run in bf16 only where all are."""
    source = saved("llama", tmp_path / "source")
    held = {name: tensor.bfloat16() for name, tensor in load_file(source / SINGLE).items()}
    save_file(held, source / SINGLE)
    assert adopt(source, tmp_path / "narrow") == 0
    assert load_frozen(tmp_path / "narrow" / "config.yaml").train.precision is Precision.bf16

    exact = torch.randn_like(held["model.layers.1.self_attn.v_proj.weight"].float())
    held["model.layers.1.self_attn.v_proj.weight"] = exact
    save_file(held, source / SINGLE)
    assert adopt(source, tmp_path / "mixed") == 0
    assert load_frozen(tmp_path / "mixed" / "config.yaml").train.precision is Precision.fp32
    found = tensors.read_weights(store.resolve(tmp_path / "mixed"))
    types = [
        found[f"decoder.layers.{layer}.self_attention.linear_qkv.linear.weight"] for layer in (0, 1)
    ]
    assert [tensor.dtype for tensor in types] == [torch.bfloat16, torch.float32]
    rows = types[1].unflatten(0, (2, -1))[:, -exact.shape[0] // 2 :].flatten(0, 1)
    assert torch.equal(rows, exact)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "change", [card, other_head, of_several_types, sharded_before], ids=lambda one: one.__name__
)
def test_exported_folders_too(
    change: Callable[[Path], None], tmp_path: Path, states: list[TrainingState]
) -> None:
    """What is changed in one counts in transformers and in a run that starts from it."""
    with saved_run(tmp_path / "run", "model.layout=2*F", "model.tie_embeddings=true") as run:
        before = run.logits(tokens := torch.randint(0, IDS, (2, 29)))
        folder = run.export(tmp_path / "exported")
    change(folder)
    model = load(folder, dtype=torch.float32)
    assert main(["import", str(folder), str(tmp_path / "start")]) == 0
    found = logits(start(tmp_path / "start", states), tokens)[..., : model.config.vocab_size]
    assert_logits(found, model, tokens)
    # And is not what it was, but for shards from before.
    error, allowed = differences(before[..., : model.config.vocab_size], model, tokens)
    assert (error <= allowed) == (change is sharded_before)
