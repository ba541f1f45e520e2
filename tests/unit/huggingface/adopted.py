"""Training's own model of what was adopted."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from hysparse_megatron.checkpoint import store
from hysparse_megatron.checkpoint.state import load_state
from hysparse_megatron.config.frozen import load_frozen
from hysparse_megatron.config.schema import Precision
from hysparse_megatron.training.state import TrainingState, build_state
from tests.unit.single_process import DEVICE


def start(folder: Path, states: list[TrainingState], **train: object) -> torch.nn.Module:
    """Training's own model, with the weights of an adopted folder and some settings of its own."""
    config = load_frozen(folder / "config.yaml")
    # Weights in bf16 are trained in it; compared with the original they are in fp32.
    of_train = dataclasses.replace(config.train, precision=Precision.fp32, **train)
    config = dataclasses.replace(config, train=of_train)
    state = build_state(config, 257, DEVICE)
    states.append(state)
    load_state(state, store.resolve(folder), weights_only=True)
    return state.chunks[0].module


@torch.no_grad()
def logits(module: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Of token ids [B, S], with the rows that fill the vocabulary up: [B, S, rows]."""
    module.eval()
    return module(tokens.to(DEVICE), None, None).cpu()
