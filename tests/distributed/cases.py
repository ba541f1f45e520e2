"""Small models, the layouts they are run on, and their data.

Big enough for several blocks per sequence and two oracles with readers, small enough for twenty
steps in seconds.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.architecture.model import Balancing, ModelConfig, MoeConfig, RouterScore
from hysparse_megatron.config.parallel import OverlapConfig
from hysparse_megatron.config.schema import (
    Config,
    DataConfig,
    MatmulPrecision,
    MuonConfig,
    MuonTensorParallel,
    OptimConfig,
    OptimizerName,
    ParallelConfig,
    Recompute,
    RecomputeModule,
    TrainConfig,
)
from hysparse_megatron.config.validate import check
from hysparse_megatron.data.read.batches import separate_documents

VOCAB = 128
SEQ_LENGTH = 32
GLOBAL_BATCH = 8
MICRO_BATCH = 2
STEPS = 20

LAYOUT = "F 2*S F 3*S F"
"""Oracles at 0 and 3 with readers 1-2 and 4-6, and an oracle at 7 that nobody reads."""

INSIDE = "F 2*S F S | 2*S F"
TWO_INSIDE = "F 2*S | F S | S | S F"
"""The second and the third cut fall into one block: a stage passes key and value on."""
INTERLEAVED = "F S | S F | 2*S | S F"
HALF_BATCH = {"global_batch_size": 4}
"""Two micro-batches instead of four, where more would only take longer."""
FEW = {"steps": 4}
"""The first of drawn parameters, the next of parameters that an update has made, and two that
moments have. What layouts do to a step shows in these; that nothing adds up over many of them is
shown by two layouts of the plain model."""
SHORT = {**HALF_BATCH, **FEW}
SHORT_FULL = {**SHORT, "recompute": Recompute.full}
TIED = {"tie_embeddings": True}


def experts(**settings: Any) -> dict[str, Any]:
    """Eight experts, two of them active, all half as wide as the dense layer."""
    sizes = {"num_experts": 8, "num_active_experts": 2, "expert_ffn_hidden_size": 32}
    # The usual weight of the auxiliary loss would drown in the gradient of the loss itself.
    return {"moe": MoeConfig(**{**sizes, "aux_loss_coefficient": 0.05, **settings})}


DENSE_FIRST: dict[str, Any] = {
    "model": experts(num_dense_first_layers=1, router_score=RouterScore.sigmoid),
    "train": FEW,
}
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 8,
    "block_size": 4,
    "num_selected_blocks": 2,
    "window": 4,
    # Ten times the usual, so that attention is far from uniform and selections mean something.
    "init_std": 0.2,
}
MUON: dict[str, Any] = {
    "name": OptimizerName.muon,
    "muon": MuonConfig(
        nesterov=True,
        extra_scale_factor=0.2,
        # In bf16 every layout would round its own way.
        matmul_precision=MatmulPrecision.highest,
        # Another update at every size by design.
        tp_mode=MuonTensorParallel.duplicated,
    ),
}
"""Muon with the update of one process on every layout."""

EXPERTS: dict[str, Any] = {
    "moe": MoeConfig(
        num_experts=8,
        num_active_experts=2,
        expert_ffn_hidden_size=32,
        shared_expert_ffn_hidden_size=16,
        num_dense_first_layers=1,
        router_score=RouterScore.sigmoid,
        balancing=Balancing.bias,
        bias_update_rate=0.01,
    )
}


@dataclass(frozen=True)
class Case:
    """A model on a parallel layout. `model`, `train` and `optim` override the small defaults."""

    name: str
    layout: str = LAYOUT
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    dp: int = 1
    cp: int = 1
    ep: int = 1
    instances: int = 1
    sp: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    overlap: OverlapConfig = field(default_factory=lambda: OverlapConfig(bucket_size=2_000))
    """As in training, but for buckets of which these small models have several."""
    documents: bool = False
    """Whether sequences hold several documents, `documents_of`, that do not see one another."""

    @property
    def world_size(self) -> int:
        """Ranks that the case needs."""
        return self.tp * self.pp * self.dp * self.cp

    def config(self) -> Config:
        """The case as a user would configure it, checked like a user's configuration."""
        config = Config(
            model=ModelConfig(**{"layout": self.layout, **SMALL, **self.model}),
            train=TrainConfig(
                **{
                    "steps": STEPS,
                    "global_batch_size": GLOBAL_BATCH,
                    "micro_batch_size": MICRO_BATCH,
                    "seq_length": SEQ_LENGTH,
                    **self.train,
                }
            ),
            parallel=ParallelConfig(
                tp=self.tp,
                pp=self.pp,
                vpp=self.vpp,
                cp=self.cp,
                ep=self.ep,
                num_distributed_optimizer_instances=self.instances,
                sequence_parallel=self.sp,
                overlap=self.overlap,
            ),
            data=DataConfig(document_mask=self.documents),
            # Adam divides by |g| + epsilon at first: where a gradient is next to zero, its rounding
            # would decide the sign of a whole step. This is far above rounding and far below |g|.
            optim=OptimConfig(
                **{
                    "learning_rate": 1e-3,
                    "min_learning_rate": 1e-4,
                    "epsilon": 1e-4,
                    **self.optim,
                }
            ),
        )
        check(config, self.world_size)
        return config


def reference_of(config: Config) -> Config:
    """The same model and training on one process: no parallel sizes, no cuts, no recompute."""
    muon = dataclasses.replace(config.optim.muon, tp_mode=MuonConfig.tp_mode)  # for slices alone
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, muon=muon),
        model=dataclasses.replace(config.model, layout=without_cuts(config.model.layout)),
        train=dataclasses.replace(
            config.train,
            recompute=Recompute.none,
            recompute_modules=[RecomputeModule.attention],
            recompute_layers=None,
            loss_chunk=None,
        ),
        parallel=ParallelConfig(),
    )


def without_cuts(layout: str) -> str:
    """The same layers, one letter each, so that equal models have equal layouts."""
    return parse_layout(layout).letters


def _mixed(seed: int, parts: tuple[int, ...]) -> int:
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return seed


def random_tokens(
    seed: int, *parts: int, sequences: int = GLOBAL_BATCH, length: int = SEQ_LENGTH
) -> Tensor:
    """Token ids [sequences, length + 1] that depend on the seed and all parts."""
    generator = torch.Generator().manual_seed(_mixed(seed, parts))
    return torch.randint(0, VOCAB, (sequences, length + 1), generator=generator)


def text_tokens(
    text: bytes, length: int, seed: int, *parts: int, sequences: int = GLOBAL_BATCH
) -> Tensor:
    """Windows of `text`, one token per byte: ids [sequences, length + 1] below 256."""
    generator = torch.Generator().manual_seed(_mixed(seed, parts))
    starts = torch.randint(0, len(text) - length, (sequences,), generator=generator)
    rows = [list(text[start : start + length + 1]) for start in starts.tolist()]
    return torch.tensor(rows)


def documents_of(sequence: int, length: int = SEQ_LENGTH) -> np.ndarray:
    """Where documents start in a sequence of a global batch: at no block's edge but by chance."""
    random = np.random.default_rng(sequence)
    return np.unique([0, *random.integers(1, length + 1, size=3)])


def microbatches(
    tokens: Tensor,
    dp_size: int,
    dp_rank: int,
    labels: Tensor | None = None,
    documents: bool = False,
) -> list[dict[str, Tensor]]:
    """A data-parallel rank's share of tokens [sequences, S + 1], dealt as in `data/batches.py`.

    Without `labels` [sequences, S] they are the next tokens. With `documents` each sequence has
    those of `documents_of`.
    """
    inputs = tokens[:, :-1]
    targets = tokens[:, 1:] if labels is None else labels
    length = inputs.shape[1]
    shares = []
    for first in range(dp_rank * MICRO_BATCH, len(tokens), dp_size * MICRO_BATCH):
        rows = slice(first, first + MICRO_BATCH)
        shares.append(
            {
                "tokens": inputs[rows].contiguous(),
                "labels": targets[rows].contiguous(),
                "loss_mask": torch.ones(MICRO_BATCH, length),
                "position_ids": torch.arange(length).expand(MICRO_BATCH, length),
            }
        )
        if documents:
            starts = [documents_of(row, length) for row in range(len(tokens))[rows]]
            separate_documents(shares[-1], starts)
    return shares
