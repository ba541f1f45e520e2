"""Mixture of experts: megatron-core's layer, whose load is measured.

Router, all-to-all dispatch and experts are megatron-core's, but for `local_experts`.
Shapes: S sequence, B batch, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from hysparse_megatron.model.layers import LayerModules
from hysparse_megatron.model.local_experts import LocalExperts
from hysparse_megatron.model.megatron_config import HySparseConfig


class _OneRankDispatcher(MoEAlltoAllTokenDispatcher):
    """The dispatcher where one rank has all experts.

    What is permuted by expert is then in the order of the experts already. megatron-core sorts it
    once more before and after them: 59 of 820 ms of a step of 12 layers of 32,768 tokens, 8 of 16
    experts each, on one H100.
    """

    def dispatch_postprocess(
        self, global_input_tokens: Tensor, global_probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and probabilities as they are, and the tokens of every expert [E]."""
        counts: Tensor = self.tokens_per_expert  # type: ignore[has-type]
        for point in ("before_permutation_2", "before_finish"):
            counts = self._maybe_dtoh_and_synchronize(point, counts)
        self.tokens_per_expert = None
        return global_input_tokens, counts, global_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Results as they are."""
        return hidden_states

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor) -> Tensor:
        """Grouped products read counts on the device: the host then waits for nothing."""
        assert isinstance(self.config, HySparseConfig)
        if self.config.grouped_experts:
            return tokens_per_expert
        return super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)


class _MoELayer(MoELayer):
    """megatron-core's layer, that sorts once on one rank and lets go of what it routed by.

    The dispatcher would keep the probabilities until the next forward pass and with them the graph
    behind them: with recompute the input of every layer, and its gradient, from step to step.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        dispatcher = self.token_dispatcher
        assert isinstance(dispatcher, MoEAlltoAllTokenDispatcher)
        if dispatcher.ep_size == dispatcher.tp_size == 1:
            # All state is the same, also what its constructor may come to be given.
            dispatcher.__class__ = _OneRankDispatcher
        # megatron-core gives experts an optimizer of their own unless EP and TP are 1. Here always,
        # so that checkpoints of any size have the same parts.
        for parameter in self.experts.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]

    def forward(self, *arguments: Any, **options: Any) -> Any:
        result = super().forward(*arguments, **options)
        self.token_dispatcher.probs = None
        return result


def moe_layer(modules: LayerModules) -> Callable[..., MoELayer]:
    """What builds the feed-forward part of a layer with experts, for a layer's `mlp` submodule."""
    experts: Callable[..., torch.nn.Module]
    if modules.grouped_experts is not None:
        experts = functools.partial(TEGroupedMLP, submodules=modules.grouped_experts)
    else:
        experts = functools.partial(LocalExperts, submodules=modules.expert_linears)
    return functools.partial(
        _MoELayer,
        submodules=MoESubmodules(
            experts=experts,
            shared_experts=functools.partial(SharedExpertMLP, submodules=modules.expert_linears),
        ),
    )


_AUXILIARY_LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
}
"""megatron-core's names of what a kind of balancing records."""


class ExpertLoads:
    """Counts, over one step, how many tokens every expert of every layer was given."""

    def __init__(self, config: HySparseConfig, chunks: Sequence[torch.nn.Module]) -> None:
        self._config = config
        experts = int(config.num_moe_experts or 0)
        device = next(chunks[0].parameters()).device
        self._counts = torch.zeros(config.num_layers, experts, device=device)
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(self._count)

    def _count(self, router: TopKRouter, _inputs: object, outputs: tuple[Tensor, Tensor]) -> None:
        # Without gradient it is an evaluation, or the first of two passes with recompute.
        if router.training and torch.is_grad_enabled():
            _, routing_map = outputs  # bool [S / T x B, E]
            assert router.layer_number is not None
            self._counts[router.layer_number - 1] += routing_map.detach().sum(dim=0)

    def take(self, num_microbatches: int) -> dict[str, float]:
        """The step's metrics, equal on all ranks, and a fresh start. Collective.

        moe_max_load: tokens of the busiest expert relative to an even share, mean over layers.
        moe_worst_load: the same in the worst layer. moe_idle_experts: share of experts without a
        token. moe_balance_loss, moe_z_loss: what the router's losses are, before their weight.
        """
        counts = self._counts.clone()
        self._counts.zero_()
        # Sequence- and data-parallel ranks route other tokens, pipeline ranks other layers.
        dist.all_reduce(counts)
        counts = counts[counts.sum(dim=1) > 0]
        if not counts.numel():
            return {}
        busiest = counts.amax(dim=1) / counts.mean(dim=1)
        metrics = {
            "moe_max_load": float(busiest.mean()),
            "moe_worst_load": float(busiest.max()),
            "moe_idle_experts": float((counts == 0).float().mean()),
        }
        return metrics | self._losses(num_microbatches)

    def _losses(self, num_microbatches: int) -> dict[str, float]:
        config = self._config
        wanted = {}
        kind = config.moe_router_load_balancing_type
        if kind in _AUXILIARY_LOSSES and config.moe_aux_loss_coeff:
            wanted[_AUXILIARY_LOSSES[str(kind)]] = "moe_balance_loss"
        if config.moe_z_loss_coeff:
            wanted["z_loss"] = "moe_z_loss"
        if not wanted:
            return {}
        found: dict[str, Tensor] = {}
        get_moe_metrics_tracker().report(
            loss_scale=1 / num_microbatches,
            iteration=0,
            force_initialize=True,
            track_names=list(wanted),
            num_layers=config.num_layers,
            moe_layer_freq=config.moe_layer_freq,
            total_loss_dict=found,
        )
        return {wanted[name]: float(value) for name, value in found.items()}
