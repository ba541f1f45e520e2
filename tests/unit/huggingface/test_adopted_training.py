"""Long and biased models are adopted, trained and exported, and transformers still agrees."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hysparse_megatron.config.frozen import freeze
from hysparse_megatron.data.tokenizer import bytes_tokenizer
from hysparse_megatron.training.state import TrainingState
from hysparse_megatron.training.step import Batch, train_step
from tests.checkpoints import save
from tests.unit.huggingface.adopted import start
from tests.unit.huggingface.exports import IDS, Run, assert_logits, load
from tests.unit.model.tiny_models import randomize
from tools.convert import main

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("seed", "group")]

ORIGINAL, LENGTH, STEPS = 16, 64, 5
SIZES = {
    "vocab_size": IDS,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LONG = {"original_max_position_embeddings": ORIGINAL, "factor": LENGTH / ORIGINAL}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LONG}


def llama(**rotary: object) -> PreTrainedModel:
    config = LlamaConfig(
        **SIZES, max_position_embeddings=LENGTH, rope_parameters={"rope_theta": 5000.0, **rotary}
    )
    return LlamaForCausalLM(config)


MODELS = {
    "llama3": lambda: llama(**LLAMA3),
    "yarn": lambda: llama(rope_type="yarn", **LONG),
    "linear": lambda: llama(rope_type="linear", factor=LENGTH / ORIGINAL),
    "biased qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, max_position_embeddings=ORIGINAL)
    ),
}


def trained(original: Path, folder: Path, layout: str, states: list[TrainingState]) -> Run:
    """Adopted, and saved after its steps. All blocks are picked: their choice is tested apart."""
    options = ["--window", "5", "--block-size", "4", "--num-selected", str(LENGTH // 4)]
    arguments = ["adopt", str(original), str(folder / "start"), "--layout", layout, *options]
    assert main(arguments) == 0
    start(folder / "start", states, seq_length=LENGTH, global_batch_size=4, micro_batch_size=2)
    [state] = states
    for step in range(STEPS):
        assert train_step(state, step, [batch(), batch()]).bad is None
    path = folder / "run"
    save(state, path, STEPS)
    freeze(state.config, path)
    bytes_tokenizer().save(str(path / "tokenizer.json"))
    return Run(path, state.config, state)


def batch() -> Batch:
    rows = torch.randint(0, IDS, (2, LENGTH + 1))
    return {
        "tokens": rows[:, :-1],
        "labels": rows[:, 1:],
        "loss_mask": torch.ones(2, LENGTH),
        "position_ids": torch.arange(LENGTH).expand(2, LENGTH),
    }


@pytest.mark.parametrize("layout", ["4*F", "F S W F"])
@pytest.mark.parametrize("name", MODELS)
def test_trained_and_exported(
    name: str, layout: str, tmp_path: Path, states: list[TrainingState]
) -> None:
    """At four times the length that the original was made for."""
    model = MODELS[name]().eval()
    randomize(model, std=1.0)
    model.save_pretrained(tmp_path / "original")
    run = trained(tmp_path / "original", tmp_path, layout, states)
    tokens = torch.randint(0, IDS, (2, LENGTH))
    expected = run.logits(tokens)
    exported = load(run.export(tmp_path / "exported"))
    with torch.no_grad():
        assert_logits(expected, exported, tokens)
        before = model(tokens).logits
        assert float((before - expected).abs().max()) > 1e-3 * float(before.abs().max())
        if layout == "4*F":  # the architecture of the original, with the weights as they are now
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "original").eval()
            model.load_state_dict(load_file(tmp_path / "exported" / "model.safetensors"))
            assert_logits(expected, model, tokens)
