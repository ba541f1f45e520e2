"""Runs whose newest checkpoint holds a random model, and what is exported from them."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hysparse_megatron.checkpoint.assemble import Source, save_weights
from hysparse_megatron.config.frozen import freeze
from hysparse_megatron.config.schema import Config
from hysparse_megatron.data.tokenizer import bytes_tokenizer
from hysparse_megatron.huggingface.weights import TABLES, model_weights
from hysparse_megatron.runtime.process_groups import destroy_process_groups
from hysparse_megatron.training.state import TrainingState, build_state
from tests.checkpoints import save
from tests.distributed.ranks import SelectionRecorder
from tests.unit.model import rounding
from tests.unit.model.tiny_models import SEQUENCE, randomize, tiny_config
from tests.unit.single_process import DEVICE
from tools.convert import main

IDS, ROWS = 257, 384
"""Of the tokenizer, which has one per byte, and of the embedding."""
LEAST_GAP = 1e-4
"""In log score. Blocks that are closer may be told apart by rounding alone."""

MOE = [
    "model.moe.num_experts=5",
    "model.moe.num_active_experts=2",
    "model.moe.expert_ffn_hidden_size=12",
    "model.moe.shared_expert_ffn_hidden_size=10",
    "model.moe.num_dense_first_layers=1",
    "model.moe.router_score=sigmoid",
    "model.moe.router_scaling=2.5",
    "model.moe.balancing=bias",
]


@dataclasses.dataclass
class Run:
    """A run directory, and the model that its checkpoint was saved from."""

    path: Path
    config: Config
    state: TrainingState

    def export(self, folder: Path, *options: str) -> Path:
        """`tools.convert export` of the newest checkpoint."""
        arguments = ["export", "--run-dir", str(self.path), *options, str(folder)]
        assert main([*arguments, "--tokenizer", str(self.path / "tokenizer.json")]) == 0
        return folder

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Of this project's model: [B, S, ids]."""
        module = self.state.chunks[0].module
        module.eval()
        return module(tokens.to(DEVICE), None, None).cpu().float()[..., :IDS]

    def clear_tokens(self, batch: int = 3, length: int = SEQUENCE) -> Tensor:
        """Random tokens [B, S] without near-ties between blocks or between experts."""
        for _ in range(100):
            tokens = torch.randint(0, IDS, (batch, length))
            model = self.config.model
            few = -(-length // model.block_size) <= model.num_selected_blocks
            scout = SelectionRecorder(measure_gaps=not few)
            with scout.watch():
                self.logits(tokens)
            if few or scout.smallest_gap >= LEAST_GAP:
                return tokens
        raise RuntimeError("no tokens without near-ties")


@contextlib.contextmanager
def saved_run(path: Path, *overrides: str, step: int = 1) -> Iterator[Run]:
    """A random model of `tiny_config`, saved after `step` steps. Needs a default process group."""
    config = tiny_config(f"model.vocab_size={IDS}", *overrides)
    state = build_state(config, IDS, DEVICE)
    try:
        module = state.chunks[0].module
        randomize(module)
        for name, parameter in module.named_parameters():
            if name in TABLES:
                parameter.data[IDS:] = 0  # as they stay in training
        for name, buffer in module.named_buffers():
            if name.endswith("expert_bias"):
                buffer.uniform_(-0.2, 0.2)
        save(state, path, step)
        freeze(config, path)
        bytes_tokenizer().save(str(path / "tokenizer.json"))
        yield Run(path, config, state)
    finally:
        destroy_process_groups()


def random_run(path: Path, *overrides: str, identity: dict | None = None) -> Path:
    """A run directory with random weights after step 0; no model is built.

    `identity` is what the manifest says of the data.
    """
    config = tiny_config(f"model.vocab_size={IDS}", f"data.cache_dir={path}/cache", *overrides)
    sources = {
        weight.name: Source(weight.shape, torch.float32, lambda w=weight: torch.randn(w.shape))
        for weight in model_weights(config.model, ROWS)
    }
    save_weights(path / "checkpoints", sources, {} if identity is None else {"data": identity})
    freeze(config, path)
    bytes_tokenizer().save(str(path / "tokenizer.json"))
    return path


def load(folder: Path, **options: object) -> PreTrainedModel:
    """What users load."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@torch.no_grad()
def differences(found: Tensor, model: PreTrainedModel, tokens: Tensor) -> tuple[float, float]:
    """Of `found` and the model's logits [B, S, ids], in the largest; and how much is allowed."""
    expected = model(tokens).logits
    error = rounding.apart(found, expected)
    if error <= rounding.USUAL:
        return error, rounding.USUAL
    moved = rounding.moved_by_rounding(model, lambda: model(tokens).logits, expected)
    return error, rounding.allowed(moved)


def assert_logits(found: Tensor, model: PreTrainedModel, tokens: Tensor) -> None:
    """They are those of `model`, to what rounding makes of it."""
    error, allowed = differences(found, model, tokens)
    assert error <= allowed, f"off by {error:.1e} of the largest, not {allowed:.1e}"
