"""Rows that fill the vocabulary up to a multiple stay out of every softmax."""

import pytest
import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from tiny_models import SEQUENCE, VOCABULARY, randomize, tiny_config, tiny_megatron_config
from torch import Tensor

from hysparse_megatron.model.builder import build_chunks
from hysparse_megatron.model.language_model import LanguageModel
from tests.unit.single_process import DEVICE

BATCH = 3
ROWS = 128


def built(groups: ProcessGroupCollection, num_ids: int, *overrides: str) -> LanguageModel:
    config = tiny_config("model.layout=F S", *overrides)
    (model,) = build_chunks(config, tiny_megatron_config(config), num_ids, groups)
    return model.to(DEVICE)


def random_tokens(num_ids: int) -> Tensor:
    return torch.randint(0, num_ids, (BATCH, SEQUENCE)).to(DEVICE)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_ids", [VOCABULARY, ROWS - 1, ROWS])
def test_a_loss_is_that_of_the_ids_alone(
    tied: bool, num_ids: int, groups: ProcessGroupCollection, seed: int
) -> None:
    model = built(groups, num_ids, f"model.tie_embeddings={str(tied).lower()}")
    randomize(model)  # the padding too, as it is in checkpoints of early versions
    tokens, labels = random_tokens(num_ids), random_tokens(num_ids)
    with torch.no_grad():
        logits = model(tokens, None, None)
    assert logits.shape == (BATCH, SEQUENCE, ROWS)
    expected = torch.nn.functional.cross_entropy(
        logits[..., :num_ids].double().transpose(1, 2), labels, reduction="none"
    )
    losses = model(tokens, None, None, labels=labels)
    # A logarithm of a sum of exponentials and a difference, in fp32.
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-5)

    losses.sum().backward()
    tables = [model.shared_embedding_or_output_weight()] if tied else []
    tables += [] if tied else [model.embedding.word_embeddings.weight, model.output_layer.weight]
    for table in tables:
        assert table.grad is not None
        assert not table.grad[num_ids:].any()
        assert table.grad[:num_ids].any()


def test_what_needs_no_padding_keeps_its_bits(groups: ProcessGroupCollection, seed: int) -> None:
    model = built(groups, ROWS)
    logits = torch.randn(SEQUENCE, BATCH, ROWS, device=DEVICE)
    labels = random_tokens(ROWS)
    found = model.compute_language_model_loss(labels, logits.clone())
    assert torch.equal(found, HybridModel.compute_language_model_loss(model, labels, logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_gradients_of_padding_are_zero_at_any_height(
    dtype: torch.dtype, shift: float, groups: ProcessGroupCollection, seed: int
) -> None:
    model = built(groups, VOCABULARY)
    logits = (torch.randn(SEQUENCE, BATCH, ROWS, device=DEVICE) + shift).to(dtype).requires_grad_()
    kept = logits.detach()[..., :VOCABULARY].double()
    labels = random_tokens(VOCABULARY)
    losses = model.compute_language_model_loss(labels, logits * 1)
    expected = torch.nn.functional.cross_entropy(kept.permute(1, 2, 0), labels, reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-5)
    losses.sum().backward()
    assert logits.grad is not None
    assert not logits.grad[..., VOCABULARY:].any()
    assert logits.grad[..., :VOCABULARY].isfinite().all()


def test_padding_begins_at_zero(groups: ProcessGroupCollection) -> None:
    model = built(groups, VOCABULARY)
    for table in (model.embedding.word_embeddings.weight, model.output_layer.weight):
        assert not table[VOCABULARY:].any()
        assert table[:VOCABULARY].all(dim=1).any()
