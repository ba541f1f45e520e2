"""One real optimizer step of a tiny model, by hand."""

import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.optimizer import optimizer as megatron_optimizer
from torch import Tensor

from hysparse_megatron.config.compose import compose
from hysparse_megatron.data.read.dataset import TokenSamples
from hysparse_megatron.data.read.held_out import EvaluationBatches
from hysparse_megatron.errors import DataError
from hysparse_megatron.plan.overview import make_overview
from hysparse_megatron.runtime.process_groups import destroy_process_groups
from hysparse_megatron.training import step as step_module
from hysparse_megatron.training.state import TrainingState, build_state
from hysparse_megatron.training.step import Batch, evaluate, train_step
from tests.token_files import write_indexed
from tests.unit.single_process import DEVICE
from tests.unit.training.tiny_states import (
    SEQUENCE,
    SETTINGS,
    VOCABULARY,
    parameters,
    random_batches,
)

BALANCED = [
    "model.moe.num_experts=4",
    "model.moe.num_active_experts=2",
    "model.moe.balancing=aux_loss",
    "model.moe.aux_loss_coefficient=0",
]


@pytest.fixture
def state(group: None) -> Iterator[TrainingState]:
    yield build_state(compose(SETTINGS), VOCABULARY, DEVICE)
    destroy_process_groups()


def by_hand(state: TrainingState, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    """Mean loss per unmasked token over all micro-batches, and its gradient."""
    (chunk,) = state.chunks
    model: Any = chunk.module
    named = dict(model.named_parameters())
    total: Any = 0.0
    for batch in batches:
        given = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
        losses = model(given["tokens"], given["position_ids"], None, labels=given["labels"])
        total = total + (losses * given["loss_mask"]).sum()
    mean = total / sum(batch["loss_mask"].sum().item() for batch in batches)
    found = torch.autograd.grad(mean, list(named.values()))
    return mean.item(), dict(zip(named, found, strict=True))


def test_first_update_by_hand(state: TrainingState, seed: int) -> None:
    batches = random_batches()
    batches[0]["loss_mask"][0, :10] = 0.0  # micro-batches with different numbers of tokens
    before = parameters(state)
    loss, gradient = by_hand(state, batches)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradient.values()))
    result = train_step(state, 0, batches)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.grad_norm == pytest.approx(norm, rel=1e-4)
    assert result.learning_rate == pytest.approx(0.01)
    assert result.skipped is False
    scale = min(1.0, 1.0 / norm)
    for name, after in parameters(state).items():
        clipped = gradient[name] * scale
        # The first update of Adam is the sign of the gradient, but for epsilon.
        move = clipped / (clipped.abs() + 1e-10)
        decayed = "norm" not in name and "sink" not in name
        wanted = before[name] * (1 - 0.01 * 0.1 * decayed) - 0.01 * move
        sure = clipped.abs() > 1e-6  # where rounding cannot turn the sign
        assert sure.any(), name
        torch.testing.assert_close(after[sure], wanted[sure], rtol=1e-4, atol=1e-6, msg=name)


def steps_of(state: TrainingState, batches: list[Batch], steps: int = 3) -> list[float]:
    return [train_step(state, step, batches).grad_norm for step in range(steps)]


@pytest.mark.parametrize("clip", ["0.05", "0"])
def test_the_norm_is_reduced_once_and_the_update_is_megatrons(
    clip: str, group: None, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit `optimizer.step()`, which reduces the norm once more."""
    reduced = []
    original = megatron_optimizer.get_grad_norm_fp32

    def counted(*arguments: Any, **options: Any) -> Any:
        reduced.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(megatron_optimizer, "get_grad_norm_fp32", counted)
    batches = random_batches()
    found = []
    for ours in (True, False):
        state = build_state(compose([*SETTINGS, f"optim.clip_grad={clip}"]), VOCABULARY, DEVICE)
        if not ours:
            monkeypatch.setattr(step_module, "update", lambda optimizer, norm: optimizer.step())
        reduced.clear()
        norms = steps_of(state, batches)
        assert len(reduced) == (3 if ours else 6)
        found.append((norms, parameters(state)))
        destroy_process_groups()
    assert found[0][0] == found[1][0]
    for name, value in found[0][1].items():
        assert torch.equal(value, found[1][1][name]), name


def routers(state: TrainingState, batches: list[Batch]) -> dict[str, Tensor]:
    """Gradients of the routers' weights, without an update."""
    train_step(state, 0, batches, lambda finite, loss, norm: "only looked at")
    (chunk,) = state.chunks
    named = chunk.module.named_parameters()
    return {name: p.main_grad.clone() for name, p in named if "router.weight" in name}


@pytest.mark.parametrize("loss", ["aux_loss_coefficient", "z_loss_coefficient"])
def test_the_weight_of_the_experts_losses_does_not_depend_on_masked_labels(
    loss: str, group: None, seed: int
) -> None:
    """What such a loss adds to the routers' gradient is the same with half of the labels masked."""
    batches = random_batches()
    masked = [{**batch, "loss_mask": torch.ones(2, SEQUENCE)} for batch in batches]
    masked[0]["loss_mask"][0] = 0.0
    masked[1]["loss_mask"][:, SEQUENCE // 2 :] = 0.0
    added = []
    for given in (batches, masked):
        found = []
        for weight in (3.0, 0.0):
            settings = [*SETTINGS, *BALANCED, f"model.moe.{loss}={weight}"]
            state = build_state(compose(settings), VOCABULARY, DEVICE)
            found.append(routers(state, given))
            destroy_process_groups()
        assert found[0]
        added.append({name: value - found[1][name] for name, value in found[0].items()})
    for name, whole in added[0].items():
        assert whole.abs().max() > 0, name
        # What is subtracted is far smaller, so that rounding stays near that of fp32.
        bound = 1e-4 * float(whole.abs().max())
        torch.testing.assert_close(added[1][name], whole, rtol=0, atol=bound, msg=name)


def test_evaluation_changes_nothing(state: TrainingState, seed: int) -> None:
    batches = random_batches(4)
    before = parameters(state)
    found = evaluate(state, [batches[:2], batches[2:]])
    assert found is not None
    assert found.loss == pytest.approx(by_hand(state, batches)[0], rel=1e-5)
    assert found.tokens == sum(batch["labels"].numel() for batch in batches)
    for name, after in parameters(state).items():
        assert torch.equal(after, before[name]), name


def test_every_held_out_token_counts_once(state: TrainingState, seed: int) -> None:
    """And not every batch: one of few tokens says less than one of many."""
    few, many = random_batches(2)
    few["loss_mask"][:] = 0.0
    few["loss_mask"][0, -2:] = 1.0
    found = evaluate(state, [[few], [many]])
    assert found is not None
    assert found.loss == pytest.approx(by_hand(state, [few, many])[0], rel=1e-6)
    assert found.tokens == many["labels"].numel() + 2
    few["loss_mask"][:] = 0.0
    with pytest.raises(DataError, match="no token"):
        evaluate(state, [[few]])


def test_held_out_loss_does_not_depend_on_the_batches(
    state: TrainingState, seed: int, tmp_path: Path
) -> None:
    """Documents of very different lengths, and a last batch that is filled up."""
    prefix = str(tmp_path / "documents")
    rng = np.random.default_rng(seed)
    # The first sample is always read: the short one in front puts a border into it.
    lengths = [3, *rng.choice([1, 2, 3, 90], size=40)]
    documents = [rng.integers(0, VOCABULARY, n) for n in lengths]
    samples = TokenSamples(write_indexed(prefix, documents, VOCABULARY), SEQUENCE)
    found = []
    for global_batch_size, micro_batch_size in ((1, 1), (4, 2), (6, 3), (64, 8)):
        batches = EvaluationBatches(
            samples,
            num_samples=11,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            document_mask=True,
        )
        numbers = range(batches.num_batches)
        found.append(evaluate(state, [list(batches.microbatches(number)) for number in numbers]))
    assert found[0] is not None
    assert found[0].tokens < 11 * SEQUENCE
    for other in found[1:]:
        assert other is not None
        assert other.tokens == found[0].tokens
        assert other.loss == pytest.approx(found[0].loss, rel=2e-5)  # a near-tie may turn


def test_a_loss_that_is_no_number_leaves_everything_as_it_was(
    state: TrainingState, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = random_batches()
    train_step(state, 0, batches)
    before = parameters(state)
    moments = [
        tensor.clone()
        for part in state.optimizer.chained_optimizers
        for kept in part.optimizer.state.values()
        for tensor in kept.values()
    ]
    original = step_module._loss

    def poisoned(loss_mask: Tensor, step: int | None, losses: Tensor) -> Any:
        return original(loss_mask, step, losses * float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "_loss", poisoned)
        result = train_step(state, 1, batches)
    assert result.skipped is True
    assert math.isnan(result.loss)
    for name, after in parameters(state).items():
        assert torch.equal(after, before[name]), name
    now = [
        tensor
        for part in state.optimizer.chained_optimizers
        for kept in part.optimizer.state.values()
        for tensor in kept.values()
    ]
    assert all(torch.equal(a, b) for a, b in zip(now, moments, strict=True))
    following = train_step(state, 2, batches)
    assert following.skipped is False
    assert math.isfinite(following.grad_norm)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_skipped_too(
    state: TrainingState, seed: int, bad: float
) -> None:
    """The loss is fine, the backward pass overflows: as bad for the weights."""
    before = parameters(state)
    (chunk,) = state.chunks
    weight = dict(chunk.module.named_parameters())["decoder.layers.1.mlp.linear_fc2.weight"]
    handle = weight.register_hook(lambda gradient: gradient * bad)
    result = train_step(state, 0, random_batches())
    handle.remove()
    assert math.isfinite(result.loss)
    for name, after in parameters(state).items():
        assert torch.equal(after, before[name]), name
    assert result.skipped is True


def test_steps_are_functions_of_their_number(state: TrainingState, seed: int) -> None:
    """Nothing that came before shows in a step, but weights and moments: no hidden counter."""
    batches = random_batches()
    before = torch.get_rng_state()
    train_step(state, 5, batches)
    first = torch.rand(3)
    torch.manual_seed(1)
    train_step(state, 5, batches)
    assert torch.equal(torch.rand(3), first)
    torch.set_rng_state(before)


# Without a balancing loss, whose tracker megatron-core sizes once in a process.
EXPERTS = [
    "model.moe.num_experts=4",
    "model.moe.num_active_experts=2",
    "model.moe.balancing=none",
]


@pytest.mark.thorough
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_no_activation_outlives_its_step(group: None, recompute: str) -> None:
    state = build_state(
        compose([*SETTINGS, *EXPERTS, f"train.recompute={recompute}"]), VOCABULARY, DEVICE
    )
    width = state.config.model.hidden_size
    before = count_activations(width)
    train_step(state, 0, random_batches())
    after = count_activations(width)
    destroy_process_groups()
    assert after == before


def count_activations(width: int) -> int:
    """Tensors that are alive and have the shape of one of this width."""
    gc.collect()
    return sum(
        torch.is_tensor(thing) and thing.shape[:1] == (SEQUENCE,) and thing.shape[-1] == width
        for thing in gc.get_objects()
    )


@pytest.mark.parametrize("in_fp32", [True, False])
def test_gradients_are_summed_in_the_precision_that_is_set(group: None, in_fp32: bool) -> None:
    """In bf16 they take what the planner says, half of fp32, and teach about the same."""
    setting = f"parallel.grad_reduce_in_fp32={str(in_fp32).lower()}"
    config = compose([*SETTINGS, "model.vocab_size=50", "train.precision=bf16", setting])
    state = build_state(config, VOCABULARY, DEVICE)
    try:
        batches = random_batches()
        losses = [train_step(state, step, batches).loss for step in range(3)]
        gradients = [buffer.grad_data for chunk in state.chunks for buffer in chunk.buffers]
        wanted = torch.float32 if in_fp32 else torch.bfloat16
        # Sinks are fp32 parameters, whose gradients are too.
        assert {g.dtype for g in gradients} == {wanted, torch.float32}
        planned = make_overview(config, 1).ranks[0].memory.gradients
        # Every parameter begins at a multiple of 64 elements, and norms are small here.
        assert sum(g.nbytes for g in gradients) == pytest.approx(planned, rel=0.1)
        assert losses[-1] < losses[0] - 0.1
    finally:
        destroy_process_groups()
