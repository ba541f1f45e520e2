"""Experts that are all on one rank: tokens are sorted by expert once, with the same result."""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from hysparse_megatron.model.experts import _OneRankDispatcher
from tests.unit.model.tiny_models import VOCABULARY, randomize, tiny_config, tiny_model
from tests.unit.single_process import DEVICE

EXPERTS = [
    "model.layout=F S",
    "model.moe.num_experts=5",
    "model.moe.num_active_experts=2",
    "model.moe.expert_ffn_hidden_size=12",
    "model.moe.shared_expert_ffn_hidden_size=8",
]


def test_one_rank_sorts_tokens_once(
    groups: ProcessGroupCollection, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against megatron-core's dispatcher, which sorts them again: loss and gradients to the bit."""
    config = tiny_config(*EXPERTS)
    model = tiny_model(config, groups)
    randomize(model)
    sorts = []
    real = token_dispatcher.sort_chunks_by_idxs

    def counted(*arguments: object, **options: object) -> object:
        sorts.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(token_dispatcher, "sort_chunks_by_idxs", counted)
    tokens = torch.randint(0, VOCABULARY, (3, 29), device=DEVICE)
    positions = torch.arange(29, device=DEVICE).expand(3, -1)

    def run() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        loss = model(tokens, positions, None, labels=tokens).mean()
        loss.backward()
        return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]

    ours = run()
    assert not sorts
    dispatchers = [layer.mlp.token_dispatcher for layer in model.decoder.layers]
    for dispatcher in dispatchers:
        assert type(dispatcher) is _OneRankDispatcher
        dispatcher.__class__ = MoEAlltoAllTokenDispatcher
    theirs = run()
    assert len(sorts) == 2 * len(dispatchers)
    assert torch.equal(ours[0], theirs[0])
    assert len(ours[1]) == len(theirs[1]) > 20
    for mine, wanted in zip(ours[1], theirs[1], strict=True):
        assert torch.equal(mine, wanted)
