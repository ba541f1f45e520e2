"""Experts in grouped products: what megatron-core's sequence of experts gives, and keeps."""

from collections.abc import Sequence

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from hysparse_megatron.model.local_experts import LocalExperts
from hysparse_megatron.plan.feed_forward import expert_matrices, feed_forward_activations
from hysparse_megatron.plan.overview import make_overview
from tests.unit.model.expert_cases import (
    COUNTS,
    built,
    draw,
    exact,
    relative_errors,
    results,
    weights,
)
from tests.unit.model.tiny_models import (
    SEQUENCE,
    VOCABULARY,
    randomize,
    tiny_config,
    tiny_model,
)
from tests.unit.single_process import DEVICE

EXPERTS = [
    "model.layout=F S",
    "model.moe.num_experts=4",
    "model.moe.num_active_experts=2",
    "model.moe.expert_ffn_hidden_size=16",
    "model.moe.shared_expert_ffn_hidden_size=8",
]
CHANNELS = 24
BOUNDS = {"fp32": 10 * 2**-24, "bf16": 10 * 2**-9}
"""Half a unit in the last place for each rounding of a few that follow one another."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "sequential"])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("precision", BOUNDS)
def test_values_and_gradients(
    seed: int, precision: str, counts: str, grouped: bool, groups: ProcessGroupCollection
) -> None:
    config = tiny_config(*EXPERTS, f"train.precision={precision}")
    experts = built(config, groups, grouped=grouped)
    case = draw(COUNTS[counts], CHANNELS, DTYPES[precision])
    got = results(experts, case)
    assert got.output.dtype == got.d_first[0].dtype == DTYPES[precision]
    assert got.d_probs.dtype == torch.float32
    for name, error in relative_errors(got, exact(experts, case), case).items():
        assert error < BOUNDS[precision], name
    idle = [expert for expert, count in enumerate(COUNTS[counts]) if not count]
    for expert in idle:
        assert not got.d_first[expert].any()
        assert not got.d_second[expert].any()


def test_parameters_are_megatrons(groups: ProcessGroupCollection) -> None:
    config = tiny_config(*EXPERTS)
    ours = built(config, groups, grouped=True)
    theirs = built(config, groups, grouped=False, kind=SequentialMLP)
    for mine, wanted in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert mine[0] == wanted[0]
        assert mine[1].shape == wanted[1].shape
        assert vars(mine[1]) == vars(wanted[1])

    def places(experts: SequentialMLP) -> dict[str, tuple]:
        stored = experts.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
        return {
            name: (part.key, getattr(part, "global_offset", None), part.replica_id)
            for name, part in stored.items()
        }

    assert places(ours) == places(theirs)
    assert dict(ours.named_parameters()).keys() <= places(ours).keys()


@pytest.mark.parametrize("frozen", ["rows", "weights"])
def test_what_is_frozen_has_no_gradient(
    seed: int, frozen: str, groups: ProcessGroupCollection
) -> None:
    experts = built(tiny_config(*EXPERTS), groups, grouped=True)
    case = draw(COUNTS["some idle"], CHANNELS, torch.float32)
    wanted = results(experts, case)
    experts.requires_grad_(frozen != "weights")
    hidden = case.hidden.clone().requires_grad_(frozen != "rows")
    experts(hidden, case.counts, case.probs)[0].backward(case.direction)
    first, second = weights(experts)
    if frozen == "weights":
        assert all(weight.grad is None for weight in (*first, *second))
        assert hidden.grad is not None
        assert torch.equal(hidden.grad, wanted.d_hidden)
        return
    assert hidden.grad is None
    for weight, gradient in zip(first, wanted.d_first, strict=True):
        assert weight.grad is not None
        assert torch.equal(weight.grad, gradient)


def test_no_copy_of_weights_waits_for_the_backward_pass(
    seed: int, groups: ProcessGroupCollection
) -> None:
    """What does is planned."""
    config = tiny_config(*EXPERTS, "train.precision=bf16", "cluster=h200")
    experts = built(config, groups, grouped=True)
    routed = SEQUENCE * config.train.micro_batch_size * config.model.moe.num_active_experts
    case = draw([routed - 10, 0, 3, 7], CHANNELS, torch.bfloat16)
    parameters = {parameter.data_ptr() for parameter in experts.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts(case.hidden.requires_grad_(), case.counts, case.probs.requires_grad_())
    probs, ends = 4 * routed, 4 * config.model.moe.num_experts
    planned = feed_forward_activations(config, 1)["experts"]
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert found == planned + probs + ends


def test_matrices_side_by_side_are_planned(
    seed: int, groups: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest at once: the first projections', or as many gradients."""
    config = tiny_config(*EXPERTS, "train.precision=bf16", "cluster=h200")
    experts = built(config, groups, grouped=True)
    made = []
    stack = torch.stack

    def watched(tensors: Sequence[Tensor]) -> Tensor:
        made.append(stack(tensors).nbytes)
        return stack(tensors)

    monkeypatch.setattr(torch, "stack", watched)
    got = results(experts, draw(COUNTS["all busy"], CHANNELS, torch.bfloat16))
    planned = expert_matrices(config, 1)
    assert len(made) == 4
    assert max(made) == planned == sum(gradient.nbytes for gradient in got.d_first)

    def working_set(*settings: str) -> int:
        few = ["cluster=h200", "train.precision=bf16", "model.vocab_size=128", *settings]
        wide = "model.moe.expert_ffn_hidden_size=16000"
        return make_overview(tiny_config(*EXPERTS, wide, *few), 1).ranks[0].memory.working_set

    for recompute in ("none", "full"):
        same = f"train.recompute={recompute}"
        added = working_set(same) - working_set(same, "model.layers=te")
        assert added > 0.8 * planned * 1000


def test_linear_layers_are_waited_for(seed: int, groups: ProcessGroupCollection) -> None:
    """Their hooks bring what other ranks have updated, in the order of the parameters."""
    experts = built(tiny_config(*EXPERTS), groups, grouped=True)
    case = draw(COUNTS["some idle"], CHANNELS, torch.float32)
    wanted = results(experts, case).output
    names, scale = [], 4.0
    for name, module in experts.named_modules():
        if list(module.parameters(recurse=False)):

            def bring(of: torch.nn.Module, _inputs: object, name: str = name) -> None:
                names.append(f"{name}.weight")
                with torch.no_grad():
                    of.get_parameter("weight").mul_(scale)

            module.register_forward_pre_hook(bring)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.div_(scale)  # a power of two: no rounding
    assert torch.equal(results(experts, case).output, wanted)
    assert names == [name for name, _ in experts.named_parameters()]


@pytest.mark.parametrize("recompute", [[], ["experts"]], ids=["kept", "again"])
def test_a_model_of_one_rank_leaves_counts_on_the_device(
    seed: int,
    recompute: list[str],
    groups: ProcessGroupCollection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss and gradients as one after another, and nothing that the host would wait for."""
    again = ["train.recompute=selective", "train.recompute_modules=[experts]"]
    model = tiny_model(tiny_config(*EXPERTS, *(again if recompute else [])), groups)
    randomize(model)
    moved = []
    real = token_dispatcher.maybe_move_tensor_to_cpu

    def watched(*arguments: object, **options: object) -> object:
        moved.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(token_dispatcher, "maybe_move_tensor_to_cpu", watched)
    tokens = torch.randint(0, VOCABULARY, (3, SEQUENCE), device=DEVICE)
    positions = torch.arange(SEQUENCE, device=DEVICE).expand(3, -1)

    def run(grouped: bool) -> tuple[Tensor, dict[str, Tensor]]:
        for layer in model.decoder.layers:
            for part in (layer.mlp.experts, layer.mlp.token_dispatcher):
                part.config.grouped_experts = grouped
            assert isinstance(layer.mlp.experts, LocalExperts)
        model.zero_grad()
        loss = model(tokens, positions, None, labels=tokens).mean()
        loss.backward()
        named = model.named_parameters()
        return loss.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}

    loss, gradients = run(grouped=True)
    assert not moved
    wanted_loss, wanted = run(grouped=False)
    assert moved
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name
