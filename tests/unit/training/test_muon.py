"""Muon: the update of every parameter by hand, and what the optimizer says it is."""

import importlib.metadata
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hysparse_megatron.config.compose import compose
from hysparse_megatron.runtime.process_groups import destroy_process_groups
from hysparse_megatron.training.muon import is_matrix, matrix_parts
from hysparse_megatron.training.state import TrainingState, build_state, describe_optimizer
from hysparse_megatron.training.step import train_step
from tests.unit.single_process import DEVICE
from tests.unit.training.tiny_states import SETTINGS, VOCABULARY, parameters, random_batches

pytestmark = pytest.mark.thorough

MODEL = [
    "model.layout=F S W",
    "model.full_gate=head",
    "model.tie_embeddings=false",
    "model.moe.num_experts=4",
    "model.moe.num_active_experts=2",
    "model.moe.expert_ffn_hidden_size=12",
    "model.moe.num_dense_first_layers=1",
]
MUON = ("optim=muon", "optim.muon.matmul_precision=highest")
RATE, DECAY, MOMENTUM, SCALE = 0.01, 0.1, 0.95, 0.2

QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


@pytest.fixture
def states(group: None) -> Iterator[Any]:
    """Builds a run from overrides, in place of the one before."""

    def build(*overrides: str) -> TrainingState:
        destroy_process_groups()
        return build_state(compose([*SETTINGS, *MODEL, *overrides]), VOCABULARY, DEVICE)

    yield build
    destroy_process_groups()


def orthogonal(matrix: Tensor) -> Tensor:
    """U p(S) V^T of the matrix U S V^T, where p are the polynomials of five steps, in fp64.

    Newton-Schulz multiplies matrices; here the polynomials are taken of the singular values.
    """
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for a, b, c in QUINTIC:
        values = a * values + b * values**3 + c * values**5
    return left @ values.diag() @ right


def update(matrix: Tensor) -> Tensor:
    """What the learning rate is multiplied with, of one matrix."""
    return SCALE * math.sqrt(max(matrix.shape)) * orthogonal(matrix)


def split(name: str, matrix: Tensor, state: TrainingState) -> list[list[int]]:
    """Rows of `matrix` that are orthogonalised together."""
    if "linear_qkv" not in name or not state.config.optim.muon.split_qkv:
        return [list(range(len(matrix)))]
    model = state.config.model
    groups = model.num_query_groups
    per_group = model.num_attention_heads // groups
    widths = [per_group * model.head_dim, model.head_dim, model.value_dim]
    layer = int(name.split(".")[2])
    # The gate of the full layer; two of the sparse one; none of the window layer.
    widths += [per_group] * {0: 1, 1: 2, 2: 0}[layer]
    assert len(matrix) == groups * sum(widths)
    rows = torch.arange(len(matrix)).view(groups, -1)
    return [part.flatten().tolist() for part in rows.split(widths, dim=1)]


def expected(
    state: TrainingState, before: dict[str, Tensor], gradients: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The matrices after one update for each of `gradients`."""
    found = {}
    for name in gradients[0]:
        weight = before[name].double()
        momentum = torch.zeros_like(weight)
        for step in gradients:
            gradient = step[name].double()
            momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
            # Nesterov: where the mean will be if the gradient stays.
            ahead = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
            weight = weight * (1 - RATE * DECAY)
            for rows in split(name, ahead, state):
                weight[rows] -= RATE * update(ahead[rows])
        found[name] = weight
    return found


def gradients_of(state: TrainingState) -> dict[str, Tensor]:
    """What Muon saw of its matrices in the last step: fp32 gradients are clipped in place."""
    (chunk,) = state.chunks
    named = chunk.module.named_parameters()
    return {name: p.main_grad.detach().clone() for name, p in named if is_matrix(p)}


@pytest.mark.parametrize("extra", [[], ["optim.muon.split_qkv=false"]], ids=["split", "whole"])
def test_updates_of_matrices_by_hand(states: Any, seed: int, extra: list[str]) -> None:
    state = states(*MUON, *extra)
    before = parameters(state)
    gradients = []
    for step in range(2):
        train_step(state, step, random_batches())
        gradients.append(gradients_of(state))
    after = parameters(state)
    matrices = expected(state, before, gradients)
    assert {name.split(".", 3)[3] for name in matrices} == {
        "self_attention.linear_qkv.linear.weight",
        "self_attention.linear_proj.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
        "mlp.router.weight",
        *(f"mlp.experts.local_experts.{e}.linear_fc{n}.weight" for e in range(4) for n in (1, 2)),
    }
    for name, wanted in matrices.items():
        moved = (wanted - before[name].double()).abs().max()
        difference = (after[name].double() - wanted).abs().max()
        # fp32 rounding, which the first polynomials enlarge about five hundredfold.
        assert difference < 1e-3 * moved, f"{name}: {difference / moved:.1e}"


def test_the_rest_is_updated_by_adamw(states: Any, seed: int) -> None:
    """The same first update as with AdamW for everything, on the same gradient."""
    batches = random_batches()
    adamw = states()
    train_step(adamw, 0, batches)
    mixed = states(*MUON)
    matrices = {name for name, p in mixed.chunks[0].module.named_parameters() if is_matrix(p)}
    train_step(mixed, 0, batches)
    ours, theirs = parameters(mixed), parameters(adamw)
    rest = ours.keys() - matrices
    for part in ("word_embeddings", "output_layer", "layernorm", "final_norm", "sink"):
        assert any(part in name for name in rest), part
        assert not any(part in name for name in matrices), part
    for name in rest:
        assert torch.equal(ours[name], theirs[name]), name
    for name in matrices:
        assert not torch.equal(ours[name], theirs[name]), name


def test_fp32_copies_have_the_marks_of_bf16_weights(states: Any, seed: int) -> None:
    """Muon sees copies; it must know the parts of projections, and which matrices are experts."""
    state = states(*MUON, "train.precision=bf16")
    (part,) = matrix_parts(state.optimizer)
    copies = [main for group in part.optimizer.param_groups for main in group["params"]]
    assert {main.dtype for main in copies} == {torch.float32}
    split_rows = [main.qkv_split_shapes for main in copies if getattr(main, "is_qkv", False)]
    assert len(split_rows) == 3
    assert sum(getattr(main, "expert_tp", False) for main in copies) == 2 * 4 * 2
    before = parameters(state)
    train_step(state, 0, random_batches())
    for name, after in parameters(state).items():
        assert after.isfinite().all(), name
        assert not torch.equal(after, before[name]) or "sink" in name, name


def test_loss_falls(states: Any, seed: int) -> None:
    state = states(*MUON, "optim.learning_rate=0.02")
    batches = random_batches()
    losses = [train_step(state, step, batches).loss for step in range(20)]
    assert losses[-1] < losses[0] - 0.5


def test_description(states: Any) -> None:
    assert describe_optimizer(states()) == "AdamW of torch"
    # Three layers with two projections; a dense one, and two with a router and four experts.
    count = 3 * 2 + 2 + 2 * (1 + 4 * 2)
    version = importlib.metadata.version("emerging-optimizers")
    assert describe_optimizer(states(*MUON)) == (
        f"Muon (emerging-optimizers {version}) for {count} matrices of rank 0, "
        "AdamW of torch for the rest"
    )
