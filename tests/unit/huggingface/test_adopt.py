"""A full-attention model of transformers, taken over: equal at the start, and it trains on."""

import copy
import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hysparse_megatron.checkpoint import store, tensors
from hysparse_megatron.data.tokenizer import bytes_tokenizer
from hysparse_megatron.runtime.process_groups import destroy_process_groups
from hysparse_megatron.training.state import TrainingState
from tests.unit.huggingface.adopted import logits, start
from tests.unit.huggingface.exports import assert_logits
from tests.unit.model.tiny_models import randomize
from tests.unit.single_process import DEVICE
from tools.convert import main

pytestmark = pytest.mark.usefixtures("seed", "group")

IDS, LENGTH = 300, 29
ORIGINAL = 7
"""Tokens that models with scaled rotary embeddings were made for: less than a quarter."""
SIZES = {
    "vocab_size": IDS,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}
ROTARY = {"rope_type": "default", "rope_theta": 5000.0}


def scaled(kind: str, **parameters: object) -> dict:
    """`rope_parameters` for four times the length."""
    return {"rope_type": kind, "rope_theta": 5000.0, "factor": 4.0, **parameters}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
FP32, BF16 = torch.float32, torch.bfloat16
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=ROTARY), FP32),
    "llama tied": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=8),
        FP32,
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None), BF16),
    "llama, linear": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, rope_parameters=scaled("linear")),
        FP32,
    ),
    "llama, llama3": (
        LlamaForCausalLM,
        LlamaConfig(
            **SIZES,
            rope_parameters=scaled("llama3", original_max_position_embeddings=ORIGINAL, **LLAMA3),
        ),
        FP32,
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True), FP32),
    "qwen2, yarn": (
        Qwen2ForCausalLM,
        Qwen2Config(
            **SIZES, rope_parameters=scaled("yarn", original_max_position_embeddings=ORIGINAL)
        ),
        BF16,
    ),
    "qwen3, yarn": (
        Qwen3ForCausalLM,
        Qwen3Config(
            **SIZES,
            rope_parameters=scaled("yarn", original_max_position_embeddings=ORIGINAL),
            head_dim=16,
        ),
        FP32,
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, rope_parameters=ROTARY, head_dim=16), FP32),
}
"""Class, settings, and the type in which the weights are saved."""
COVERING = ["--window", "64", "--block-size", "4", "--num-selected", "16"]
SMALL = ["--window", "5", "--block-size", "4", "--num-selected", "2"]


def original(name: str, folder: Path) -> PreTrainedModel:
    """A random model, saved in `folder` with a tokenizer."""
    kind, config, dtype = MODELS[name]
    model = kind(config).eval()
    randomize(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    bytes_tokenizer().save(str(folder / "tokenizer.json"))
    return model


def adopt(source: Path, folder: Path, layout: str, *options: str) -> Path:
    assert main(["adopt", str(source), str(folder), "--layout", layout, *options]) == 0
    return folder


def test_tokens_around_a_text_that_it_does_not_get_here_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "original"
    original("llama", source)
    adopt(source, tmp_path / "plain", "4*F", *SMALL)
    assert "around a text" not in capsys.readouterr().out
    tokenizer = bytes_tokenizer()
    names = ["<|begin|>", "<|text|>"]
    tokenizer.add_special_tokens(names)
    for single, told in [("<|begin|> $A", ""), ("<|begin|> <|text|> $A", " and ".join(names))]:
        tokenizer.post_processor = TemplateProcessing(
            single=single, special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
        )
        tokenizer.save(str(source / "tokenizer.json"))
        adopt(source, tmp_path / f"start {len(single)}", "4*F", *SMALL)
        warned = f"tokenizer.json puts {told} around a text" in capsys.readouterr().out
        assert warned == bool(told)


def test_a_begin_that_the_model_lacks_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "original"
    original("llama", source)
    tokenizer = bytes_tokenizer()
    tokenizer.add_special_tokens([f"<{number}>" for number in range(257, IDS + 1)])
    tokenizer.post_processor = TemplateProcessing(
        single=f"<{IDS}> $A", special_tokens=[(f"<{IDS}>", IDS)]
    )
    tokenizer.save(str(source / "tokenizer.json"))
    options = ["adopt", str(source), str(tmp_path / "start"), "--layout", "4*F", *SMALL]
    assert main(options) == 2
    assert f"documents would begin with <{IDS}> (id {IDS})" in capsys.readouterr().err


@pytest.mark.parametrize("name", MODELS)
def test_full_layers_are_the_original(
    name: str, tmp_path: Path, states: list[TrainingState]
) -> None:
    model = original(name, tmp_path / "original")
    module = start(adopt(tmp_path / "original", tmp_path / "start", "4*F", *SMALL), states)
    tokens = torch.randint(0, IDS, (2, LENGTH))
    assert_logits(logits(module, tokens)[..., :IDS], model, tokens)


def test_what_covers_the_text_starts_as_the_original(
    tmp_path: Path, states: list[TrainingState]
) -> None:
    """Sparse and window layers too, but for the shares of their sinks."""
    model = original("qwen3", tmp_path / "original")
    tokens = torch.randint(0, IDS, (2, LENGTH))
    with torch.no_grad():
        expected = model(tokens).logits
    scale = float(expected.abs().max())
    distances = {}
    for sink in (30, 4):
        folder = tmp_path / f"start-{sink}"
        adopt(tmp_path / "original", folder, "F S W F", *COVERING, "--sparse-sink", str(sink))
        module = start(folder, states)
        distances[sink] = float((logits(module, tokens)[..., :IDS] - expected).abs().max()) / scale
        destroy_process_groups()
    # A window's sink takes exp(-10) of a row whose logits are about 0, and this model amplifies.
    assert distances[30] < 1e-2
    # Beside which only a sparse sink that takes far more than that is seen.
    assert distances[30] < distances[4] < 1


def test_weights_are_kept_to_the_bit(tmp_path: Path) -> None:
    model = original("llama", tmp_path / "original").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "original")
    folder = adopt(tmp_path / "original", tmp_path / "start", "F S W F", *SMALL)
    found = tensors.read_weights(store.resolve(folder))
    kept = model.state_dict()
    embedding = found["embedding.word_embeddings.weight"]
    assert embedding.shape == (384, 48)
    assert torch.equal(embedding[:IDS], kept["model.embed_tokens.weight"])
    assert not embedding[IDS:].any()
    for layer in range(4):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        fused = found[f"{ours}.self_attention.linear_qkv.linear.weight"].view(2, -1, 48)
        for group in range(2):
            query = kept[f"{theirs}.self_attn.q_proj.weight"].view(2, 24, 48)
            key = kept[f"{theirs}.self_attn.k_proj.weight"].view(2, 12, 48)
            value = kept[f"{theirs}.self_attn.v_proj.weight"].view(2, 12, 48)
            rows = torch.cat([query[group], key[group], value[group]])
            assert torch.equal(fused[group, :48], rows)
            assert not fused[group, 48:].any()  # gates of one half
        factor = 2 if layer == 1 else 1
        output = kept[f"{theirs}.self_attn.o_proj.weight"]
        assert torch.equal(found[f"{ours}.self_attention.linear_proj.weight"], factor * output)
        gate_up = torch.cat([kept[f"{theirs}.mlp.{name}_proj.weight"] for name in ("gate", "up")])
        assert torch.equal(found[f"{ours}.mlp.linear_fc1.weight"], gate_up)
    assert found["decoder.layers.1.self_attention.sparse_sink"].dtype == torch.float32
    assert torch.equal(found["output_layer.weight"][:IDS], kept["lm_head.weight"])


def test_trains_on(tmp_path: Path, states: list[TrainingState]) -> None:
    original("llama", tmp_path / "original")
    module = start(adopt(tmp_path / "original", tmp_path / "start", "F S S F", *SMALL), states)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    losses = train(module, steps=8)
    assert losses[-1] < 0.8 * losses[0]
    # Gates and sinks too.
    assert not any(map(torch.equal, module.parameters(), before))


def train(module: torch.nn.Module, steps: int) -> list[float]:
    """Losses of random tokens, the same in all steps."""
    module.train()
    tokens = torch.randint(0, IDS, (2, LENGTH + 1)).to(DEVICE)
    parameters = list(module.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = module(tokens[:, :-1], None, None, labels=tokens[:, 1:].contiguous()).mean()
        # megatron-core's wrapper would take them for its own optimizer.
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = gradient
        optimizer.step()
        losses.append(loss.item())
    return losses


def edit(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "layout", "said"),
    [
        ({"model_type": "gpt2"}, "4*F", "type gpt2 cannot be adopted; allowed llama, mistral"),
        ({"model_type": "qwen2"}, "4*F", "no model.layers.0.self_attn.q_proj.bias"),
        ({"attention_bias": True}, "4*F", "attention_bias; allowed are biases of queries"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
            "4*F",
            "of type dynamic; allowed default, linear, llama3, yarn",
        ),
        ({"hidden_act": "gelu"}, "4*F", "hidden_act gelu"),
        ({"sliding_window": 8}, "4*F", "sliding window"),
        ({}, "F 2*S", "has 3 layers, but the model"),
        ({}, "S 3*F", "before any full layer"),
        ({"intermediate_size": 44}, "4*F", "mlp.gate_proj.weight is [40, 48], not [44, 48]"),
        ({"num_attention_heads": 3}, "4*F", "model.num_attention_heads"),
    ],
)
def test_what_cannot_be_adopted_is_said(
    settings: dict, layout: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original("llama", tmp_path / "original")
    edit(tmp_path / "original", **settings)
    target = str(tmp_path / "start")
    assert main(["adopt", str(tmp_path / "original"), target, "--layout", layout]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "start").exists()
