import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hysparse_megatron.data.read.order import sample_ids


def epoch_ids(num_samples: int, epoch: int, seed: int = 0, fingerprint: str = "f") -> np.ndarray:
    positions = np.arange(epoch * num_samples, (epoch + 1) * num_samples)
    return sample_ids(positions, seed=seed, fingerprint=fingerprint, num_samples=num_samples)


@pytest.mark.thorough
@settings(max_examples=150)
@given(
    num_samples=st.integers(1, 5000),
    epoch=st.integers(0, 2**31),
    seed=st.integers(0, 2**63),
    fingerprint=st.text(max_size=8),
)
def test_every_epoch_is_a_permutation(
    num_samples: int, epoch: int, seed: int, fingerprint: str
) -> None:
    ids = epoch_ids(num_samples, epoch, seed, fingerprint)
    assert ids.dtype == np.int64
    assert np.array_equal(np.sort(ids), np.arange(num_samples))


@pytest.mark.parametrize("num_samples", [*range(1, 20), 2**16 - 1, 2**16, 2**16 + 1, 99_991])
def test_permutation_at_chosen_sizes(num_samples: int) -> None:
    assert np.array_equal(np.sort(epoch_ids(num_samples, 1)), np.arange(num_samples))


def test_epochs_seeds_and_data_are_ordered_differently(seed: int) -> None:
    first = epoch_ids(1000, 0, seed)
    for other in (
        epoch_ids(1000, 1, seed),
        epoch_ids(1000, 0, seed + 1),
        epoch_ids(1000, 0, seed, "g"),
        np.arange(1000),
    ):
        assert (first == other).mean() < 0.02


@settings(max_examples=50)
@given(st.integers(2, 300), st.lists(st.integers(0, 5000), min_size=1, max_size=60))
def test_any_subset_in_any_order_gives_the_same_ids(num_samples: int, chosen: list[int]) -> None:
    everything = sample_ids(np.arange(5001), seed=3, fingerprint="f", num_samples=num_samples)
    some = sample_ids(np.array(chosen), seed=3, fingerprint="f", num_samples=num_samples)
    assert np.array_equal(some, everything[chosen])


def test_order_is_frozen() -> None:
    """Changing the order would break the resume of every existing run."""
    ids = sample_ids(np.arange(12), seed=1234, fingerprint="abc", num_samples=10)
    assert ids.tolist() == [0, 3, 7, 4, 1, 8, 5, 9, 6, 2, 1, 8]


@pytest.mark.parametrize("num_samples", [3, 5, 16, 41])
def test_places_and_neighbours_are_spread_evenly(num_samples: int, seed: int) -> None:
    """Over many epochs each sample visits each place, and follows each other one, equally often."""
    epochs = 100 * num_samples
    ids = sample_ids(
        np.arange(epochs * num_samples), seed=seed, fingerprint="f", num_samples=num_samples
    ).reshape(epochs, num_samples)
    for place in (0, num_samples // 2, num_samples - 1):
        counts = np.bincount(ids[:, place], minlength=num_samples)
        chi_square = ((counts - 100) ** 2 / 100).sum()
        degrees = num_samples - 1
        assert chi_square < degrees + 7 * np.sqrt(2 * degrees) + 10
    steps = np.bincount((ids[:, 1] - ids[:, 0]) % num_samples, minlength=num_samples)[1:]
    expected = epochs / (num_samples - 1)
    chi_square = ((steps - expected) ** 2 / expected).sum()
    degrees = num_samples - 2
    assert chi_square < degrees + 7 * np.sqrt(2 * degrees) + 10


def test_huge_ranges_need_no_table() -> None:
    num_samples = 10**12 + 39
    ids = sample_ids(
        np.arange(5 * 10**12, 5 * 10**12 + 10_000), seed=0, fingerprint="f", num_samples=num_samples
    )
    assert len(np.unique(ids)) == len(ids)
    assert ids.min() >= 0
    assert ids.max() < num_samples
    assert abs(ids.mean() / num_samples - 0.5) < 0.03


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="num_samples"):
        sample_ids(np.arange(2), seed=0, fingerprint="f", num_samples=0)
    with pytest.raises(ValueError, match="positions"):
        sample_ids(np.array([-1]), seed=0, fingerprint="f", num_samples=4)
