"""Held-out loss by position."""

import math
import random

import pytest
import torch

from hysparse_megatron.evaluation.positions import loss_by_position

pytestmark = pytest.mark.usefixtures("seed")


def test_bins_are_means_over_their_positions() -> None:
    length, num_bins = random.randint(10, 50), random.randint(1, 8)
    batches = [torch.rand(random.randint(1, 4), length) for _ in range(3)]
    batches[0][0, : length // 2] = math.nan  # tokens that do not count
    joined = torch.cat(batches)
    whole, bins = loss_by_position(batches, num_bins)
    assert whole.loss == pytest.approx(joined.nanmean().item(), rel=1e-6)
    assert whole.tokens == int((~joined.isnan()).sum()) == sum(one.tokens for one in bins)
    assert (bins[0].first, bins[-1].last) == (0, length - 1)
    for one in bins:
        part = joined[:, one.first : one.last + 1]
        assert one.loss == pytest.approx(part.nanmean().item(), rel=1e-6)
        assert one.perplexity == pytest.approx(math.exp(one.loss))
    widths = [one.last - one.first + 1 for one in bins]
    assert max(widths) - min(widths) <= 1


def test_more_bins_than_positions() -> None:
    _, bins = loss_by_position([torch.tensor([[1.0, 2.0, math.nan]])], 10)
    assert [(one.first, one.last, one.loss) for one in bins] == [(0, 0, 1.0), (1, 1, 2.0)]


def test_the_perplexity_of_a_hopeless_model_is_infinite() -> None:
    whole, _ = loss_by_position([torch.full((1, 3), 1000.0)], 1)
    assert (whole.loss, whole.perplexity) == (1000.0, math.inf)


def test_without_tokens() -> None:
    with pytest.raises(ValueError, match="no token"):
        loss_by_position([torch.full((1, 3), math.nan)], 2)
