"""Which token is drawn."""

import pytest
import torch

from hysparse_megatron.inference.sampling import Sampler, Sampling

VOCABULARY = 10


def random_logits(rows: int) -> torch.Tensor:
    """With padding that would win."""
    logits = torch.randn(rows, VOCABULARY + 6)
    logits[:, VOCABULARY:] = 50.0
    return logits


def draw(sampling: Sampling, logits: torch.Tensor, count: int) -> torch.Tensor:
    """`count` tokens of each sequence: [count, A]."""
    sampler = Sampler(sampling, VOCABULARY)
    numbers = range(len(logits))
    return torch.stack([sampler.choose(logits, numbers) for _ in range(count)])


def test_greedy_takes_the_best_that_exists(seed: int) -> None:
    logits = random_logits(4)
    found = draw(Sampling(), logits, 2)
    assert torch.equal(found, logits[:, :VOCABULARY].argmax(-1).expand(2, -1))


def test_draws_follow_the_softmax(seed: int) -> None:
    logits = random_logits(1)
    found = draw(Sampling(temperature=0.7, seed=seed), logits, 4000)
    expected = torch.softmax(logits[0, :VOCABULARY] / 0.7, -1)
    share = torch.bincount(found.flatten(), minlength=VOCABULARY) / 4000
    deviation = (expected * (1 - expected) / 4000).sqrt()
    assert ((share - expected).abs() <= 5 * deviation + 1e-6).all()


def test_a_nucleus_is_the_fewest_that_reach_the_sum(seed: int) -> None:
    probability = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15, 0.0, 0.0, 0.0, 0.0, 0.0]])
    logits = torch.nn.functional.pad(probability.log(), (0, 6), value=50.0)
    for top_p, kept in ((0.39, {1}), (0.69, {1, 3}), (0.71, {1, 3, 4}), (1.0, {0, 1, 2, 3, 4})):
        found = draw(Sampling(temperature=1.0, top_p=top_p, seed=seed), logits, 300)
        assert set(found.flatten().tolist()) == kept


def test_a_seed_repeats_and_another_does_not(seed: int) -> None:
    logits = random_logits(3)
    first, again, other = (
        draw(Sampling(temperature=2.0, seed=number), logits, 20)
        for number in (seed, seed, seed + 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:, 0], first[:, 1])


def test_what_a_sequence_draws_does_not_depend_on_the_others(seed: int) -> None:
    logits = random_logits(3)
    sampling = Sampling(temperature=1.5, top_p=0.95, seed=seed)
    together = draw(sampling, logits, 12)
    sampler = Sampler(sampling, VOCABULARY)
    alone = [int(sampler.choose(logits[2:], [2])) for _ in range(12)]
    assert alone == together[:, 2].tolist()


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-6, 0.01])
def test_cold_draws_are_greedy(temperature: float, seed: int) -> None:
    logits = random_logits(2)
    logits[:, 3] = 20.0
    assert (draw(Sampling(temperature=temperature), logits, 10) == 3).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_without_a_token_are_never_chosen(temperature: float, seed: int) -> None:
    logits = random_logits(2)
    logits[:, [2, 5]] = 60.0
    sampler = Sampler(Sampling(temperature=temperature, seed=seed), VOCABULARY, {2, 5, 12})
    for _ in range(20):
        assert not set(sampler.choose(logits, [0, 1]).tolist()) & {2, 5}
