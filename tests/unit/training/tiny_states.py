"""Settings of a training state small enough for one process, batches for it, and its parameters."""

import torch
from torch import Tensor

from hysparse_megatron.training.state import TrainingState
from hysparse_megatron.training.step import Batch

SEQUENCE, VOCABULARY = 16, 50
SETTINGS = [
    "model.layout=F S W F",
    "model.hidden_size=24",
    "model.ffn_hidden_size=20",
    "model.head_dim=8",
    "model.block_size=4",
    "model.num_selected_blocks=2",
    "model.window=5",
    "model.qk_norm=true",
    f"train.seq_length={SEQUENCE}",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "optim.warmup_steps=0",
    "optim.learning_rate=0.01",
]


def random_batches(count: int = 2) -> list[Batch]:
    batches = []
    for _ in range(count):
        rows = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1))
        batches.append(
            {
                "tokens": rows[:, :-1],
                "labels": rows[:, 1:],
                "loss_mask": torch.ones(2, SEQUENCE),
                "position_ids": torch.arange(SEQUENCE).expand(2, SEQUENCE),
            }
        )
    return batches


def parameters(state: TrainingState) -> dict[str, Tensor]:
    (chunk,) = state.chunks
    return {name: p.detach().clone() for name, p in chunk.module.named_parameters()}
