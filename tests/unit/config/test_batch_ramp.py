"""Sizes on the ramp, against Megatron's calculator and by hand."""

import random

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from hysparse_megatron.config.batch_ramp import BatchRamp
from hysparse_megatron.config.compose import compose


def test_sizes_are_megatrons(rng: random.Random) -> None:
    """Its calculator takes the sizes one by one, each from so many samples on."""
    for _ in range(50):
        start, increment, rises = rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 9)
        part, final = rng.randint(1, 50), start + rises * increment
        sizes = " ".join(f"{part * n}:{start + increment * n}" for n in range(rises + 1))
        megatron = StepBatchsizeNumMicroBatchesCalculator(1, 1, False, 1, sizes)
        ramp = BatchRamp(start, increment, rises * part)
        for place in range(rises * part + 20):
            megatron.update(place, consistency_check=True)
            assert ramp.size_at(place, final) == megatron.get_current_global_batch_size()
        assert ramp.sizes(final) == [size for _, size in megatron.schedule]


def test_the_samples_of_steps_are_counted_one_by_one(rng: random.Random) -> None:
    for _ in range(50):
        ramp = BatchRamp(rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 99))
        final = ramp.start + ramp.increment * rng.randint(1, 5)
        place = first = rng.randint(0, 120)
        steps = rng.randint(0, 40)
        for _ in range(steps):
            place += ramp.size_at(place, final)
        assert ramp.samples_of(steps, first, final) == place - first


def test_by_hand() -> None:
    train = compose(["train.batch_ramp=[2,2,12]", "train.global_batch_size=8"]).train
    assert train.ramp == BatchRamp(2, 2, 12)
    assert [train.samples_of(steps) for steps in range(8)] == [0, 2, 4, 8, 14, 22, 30, 38]
    assert compose(["train.global_batch_size=8"]).train.samples_of(5) == 40
