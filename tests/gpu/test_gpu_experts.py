"""Experts in torch's grouped products on a GPU, against one after another and against fp64."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import Config
from hysparse_megatron.model.builder import build_chunks
from hysparse_megatron.model.layers import describe_layers, resolve_layers
from hysparse_megatron.model.megatron_config import make_megatron_config
from hysparse_megatron.runtime.random import seed_step
from tests.gpu.trained import EXPERTS, MODEL
from tests.unit.model.expert_cases import built, draw, exact, relative_errors, results
from tests.unit.single_process import model_groups

DEVICE = torch.device("cuda")
BOUND = 10 * 2**-9
"""As that of the tests on a CPU."""


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroupCollection]:
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("torch has no grouped products for this GPU")
    with model_groups() as made:
        seed_step(0, 0, made)
        yield made


@contextmanager
def no_waiting() -> Iterator[None]:
    """Refuse all that makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def shapes(experts: int, hidden: int, width: int) -> Config:
    return compose(
        [
            *MODEL,
            f"model.moe.num_experts={experts}",
            "model.moe.num_active_experts=2",
            f"model.hidden_size={hidden}",
            f"model.moe.expert_ffn_hidden_size={width}",
            "train.precision=bf16",
        ]
    )


@pytest.mark.parametrize(
    "counts",
    [
        [200, 131, 1, 7],
        [0, 300, 0, 5],
        [0, 0, 0, 513],
        [3, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 1] * 32,
        [128] * 64,
    ],
    ids=lambda counts: f"{len(counts)}-experts-{sum(counts)}-rows",
)
@pytest.mark.parametrize(("hidden", "width"), [(256, 136), (520, 64)])
def test_values_and_gradients(
    seed: int, hidden: int, width: int, counts: list[int], groups: ProcessGroupCollection
) -> None:
    experts = built(shapes(len(counts), hidden, width), groups, grouped=True)
    case = draw(counts, hidden, torch.bfloat16)
    results(experts, case)  # what is set up once may wait
    with no_waiting():
        got = results(experts, case)
    wanted = exact(experts, case)
    experts.config.grouped_experts = False
    for found in (got, results(experts, case)):
        for name, error in relative_errors(found, wanted, case).items():
            assert error < BOUND, name
    for expert, count in enumerate(counts):
        if not count:
            assert not got.d_first[expert].any()
            assert not got.d_second[expert].any()


def test_repeated_bit_for_bit(seed: int, groups: ProcessGroupCollection) -> None:
    experts = built(shapes(8, 256, 128), groups, grouped=True)
    case = draw([700, 0, 33, 128, 129, 1, 2000, 64], 256, torch.bfloat16)
    first, second = (results(experts, case) for _ in range(2))
    assert torch.equal(first.output, second.output)
    assert torch.equal(first.d_hidden, second.d_hidden)
    for one, other in zip(first.d_first, second.d_first, strict=True):
        assert torch.equal(one, other)


def test_a_model_of_one_rank(seed: int, groups: ProcessGroupCollection) -> None:
    """Chosen, told, and losses and gradients as one after another."""
    config = compose(
        [*MODEL, *EXPERTS, "train.precision=bf16", "model.layers=local", "model.backend=triton"]
    )
    layers = resolve_layers(config.model, DEVICE)
    if layers.apex_sums:
        pytest.skip("apex adds weight gradients to their sum")
    megatron = make_megatron_config(config, layers)
    assert megatron.grouped_experts
    told = describe_layers(layers, config.model, megatron.grouped_experts)
    assert "experts in torch's grouped products" in told
    (model,) = build_chunks(config, megatron, 128, groups, layers)
    model.to(DEVICE)
    length = config.train.seq_length
    tokens = torch.randint(128, (2, length + 1), device=DEVICE)
    position = torch.arange(length, device=DEVICE).expand(2, -1)

    def run(grouped: bool) -> tuple[Tensor, dict[str, Tensor]]:
        for layer in model.decoder.layers:
            for part in (layer.mlp.experts, layer.mlp.token_dispatcher):
                part.config.grouped_experts = grouped
        model.zero_grad()
        labels = tokens[:, 1:].contiguous()
        losses = model(tokens[:, :-1].contiguous(), position, None, labels=labels)
        losses.float().mean().backward()
        named = model.named_parameters()
        return losses.detach().float(), {n: p.grad.double() for n, p in named if p.grad is not None}

    (losses, gradients), (wanted, expected) = run(grouped=True), run(grouped=False)
    # Rounding sends a few tokens to other experts, in layers behind the first.
    assert (losses - wanted).norm() < 2e-2 * wanted.norm()
    assert gradients.keys() == expected.keys()
    norm, size = (
        float(torch.stack([gradient.norm() for gradient in of.values()]).norm())
        for of in (gradients, expected)
    )
    assert abs(norm - size) < 2e-2 * size
