"""Blending by weights and skipping of steps, on random sizes."""

import json
import random
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpora import prepare

from hysparse_megatron.config.batch_ramp import BatchRamp
from hysparse_megatron.config.blend import parse_blend
from hysparse_megatron.config.skips import Skips
from hysparse_megatron.data.card import PreparedCorpus
from hysparse_megatron.data.read.batches import BatchSource
from hysparse_megatron.data.read.blend import MOST_PLACES, Blend
from hysparse_megatron.data.read.dataset import BlendedSamples, TokenSamples
from hysparse_megatron.data.read.held_out import EvaluationBatches
from hysparse_megatron.data.read.order import Position
from hysparse_megatron.data.sources import load_blend, open_samples
from hysparse_megatron.errors import DataError
from tests.token_files import write_indexed

WEIGHTS = st.lists(st.integers(1, 400).map(lambda n: n / 100), min_size=1, max_size=8)


@settings(max_examples=60)
@given(WEIGHTS, st.integers(1, 5000))
def test_counts_stay_within_one_sample_of_the_weights(weights: list[float], length: int) -> None:
    which, own = Blend(weights).locate(np.arange(length))
    total = sum(Fraction(str(weight)) for weight in weights)
    for dataset, weight in enumerate(weights):
        chosen = which == dataset
        # Each dataset's own stream is read from its start without a gap.
        assert own[chosen].tolist() == list(range(chosen.sum()))
        share = float(Fraction(str(weight)) / total)
        expected = share * np.arange(1, length + 1)
        assert np.abs(np.cumsum(chosen) - expected).max() < 1 + 1e-6


@settings(max_examples=40)
@given(WEIGHTS, st.lists(st.integers(0, 10**9), min_size=1, max_size=20))
def test_a_place_is_the_same_whatever_else_is_asked(
    weights: list[float], positions: list[int]
) -> None:
    blend = Blend(weights)
    together = blend.locate(np.array(positions))
    alone = [blend.locate(np.array([position])) for position in positions]
    assert together[0].tolist() == [int(which[0]) for which, _ in alone]
    assert together[1].tolist() == [int(own[0]) for _, own in alone]


def test_far_positions_need_no_table() -> None:
    blend = Blend([0.7, 0.2, 0.1])
    which, own = blend.locate(np.array([10**12 - 1, 10**12]))
    before = 10**11
    assert which[1] == Blend([0.7, 0.2, 0.1]).locate(np.array([0]))[0][0]
    assert own[1] == [7 * before, 2 * before, before][which[1]]
    assert len(blend._pattern) == 10


def test_weights_of_many_digits_are_rounded() -> None:
    blend = Blend([1.0, 3.14159265358979, 1e-9])
    assert len(blend._pattern) <= MOST_PLACES + 1
    assert sum(blend.shares) == 1
    assert blend.shares[2] > 0  # a dataset that was asked for is never left out
    assert abs(float(blend.shares[1]) - 3.14159265 / 4.14159265) < 2e-5


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -1.0], [float("nan")], [float("inf")]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="positive numbers"):
        Blend(weights)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)), max_size=4))
def test_skipped_steps_are_never_trained_on(gaps: list[tuple[int, int]]) -> None:
    ranges: list[tuple[int, int]] = []
    for gap, length in gaps:
        first = (ranges[-1][1] if ranges else -1) + 1 + gap
        ranges.append((first, first + length))
    text = ", ".join(f"{first}-{last}" for first, last in ranges)
    skips = Skips.parse(text)
    assert list(skips.ranges) == ranges
    skipped = {step for first, last in ranges for step in range(first, last + 1)}
    wanted = [step for step in range(400) if step not in skipped]
    assert [skips.data_step(step) for step in range(len(wanted))] == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "expected a step"),
        ("5-", "expected a step"),
        ("7-3", "first step comes after the last"),
        ("3-5, 5", "must ascend"),
    ],
)
def test_bad_skips(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Skips.parse(text)


def blended(folder: Path) -> BlendedSamples:
    """Token t of dataset d is 1000 d + t, in samples of 5 tokens: 20, 8 and 3 samples."""
    parts = []
    for dataset, tokens in enumerate((101, 42, 16)):
        prefix = str(folder / f"part{dataset}")
        write_indexed(prefix, [1000 * dataset + np.arange(tokens)], 60_000)
        parts.append(TokenSamples(prefix, 5))
    return BlendedSamples(parts, ["a", "b", "c"], [2, 1, 1])


def test_every_dataset_has_epochs_of_its_own(tmp_path: Path) -> None:
    samples = blended(tmp_path)
    assert (samples.num_samples, samples.num_tokens) == (31, 159)
    source = BatchSource(
        samples, seed=3, fingerprint="all", global_batch_size=4, micro_batch_size=2,
    )  # fmt: skip
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in range(24):
        for batch in source.microbatches(Position(4 * step)):
            for token in batch["tokens"][:, 0].tolist():
                seen[token // 1000].append(token % 1000 // 5)
    assert [len(ids) for ids in seen.values()] == [48, 24, 24]
    for dataset, size in enumerate((20, 8, 3)):
        for epoch in range(len(seen[dataset]) // size):
            once = seen[dataset][epoch * size : (epoch + 1) * size]
            assert sorted(once) == list(range(size))
    with pytest.raises(IndexError):
        samples[31]


def test_skipped_steps_change_no_earlier_one(tmp_path: Path) -> None:
    shape = {"global_batch_size": 4, "micro_batch_size": 2}
    samples = blended(tmp_path)
    plain = BatchSource(samples, seed=3, fingerprint="all", **shape)
    skips = Skips.parse("2-3, 6")
    skipping = BatchSource(samples, seed=3, fingerprint="all", **shape, skips=skips)
    found, position = [], Position()
    for _ in range(5):
        found.append(skipping.sample_ids(position).tolist())
        position = skipping.after(position)
    assert found == [plain.sample_ids(Position(4 * step)).tolist() for step in (0, 1, 4, 5, 7)]
    assert position == Position(samples=20, left_out=12, steps=8)
    # What is named before a position is past: nothing moves, and nothing is read twice.
    assert plain.sample_ids(position).tolist() == skipping.sample_ids(position).tolist()


def test_a_run_without_the_skipped_steps_has_the_same_other_batches(seed: int) -> None:
    """Their sizes included, whatever the ramp and the changes of the batch size before them."""
    draw = random.Random(seed)
    samples: Any = SimpleNamespace(sample_ids=lambda places, **fixed: places)
    starts = [
        (draw.randint(1, 9), final, BatchRamp(2, draw.choice([1, 2]), draw.randint(1, 60)))
        for final in draw.choices([4, 6, 8], k=5)
    ]
    ends = set(np.cumsum([steps for steps, *_ in starts]).tolist())
    others = [step for step in range(max(ends)) if step + 1 not in ends]
    skipped = set(draw.sample(others, k=len(others) // 3))
    skips = Skips.parse(",".join(map(str, sorted(skipped))))

    def batches(skips: Skips) -> dict[int, list[int]]:
        """By the step from 0, those left out counted."""
        found, position = {}, Position()
        for steps, final, ramp in starts:
            source = BatchSource(
                samples, seed=0, fingerprint="", global_batch_size=final, micro_batch_size=1,
                ramp=ramp, skips=skips,
            )  # fmt: skip
            end = position.steps + steps
            while position.steps < end:
                after = source.after(position)
                found[after.steps - 1] = source.sample_ids(position).tolist()
                position = after
        trained_on = [place for batch in found.values() for place in batch]
        assert position.samples == len(trained_on) == len(set(trained_on))
        return found

    plain, left = batches(Skips()), batches(skips)
    assert not skipped & left.keys()
    assert left == {step: ids for step, ids in plain.items() if step not in skipped}


def test_ranges_are_jumped_over_as_if_step_by_step(rng: random.Random) -> None:
    samples: Any = SimpleNamespace(sample_ids=lambda places, **fixed: places)
    for _ in range(200):
        numbers = sorted(rng.sample(range(120), 2 * rng.randint(0, 4)))
        ranges = list(zip(numbers[::2], numbers[1::2], strict=True))
        final = 2 + 2 * rng.randint(1, 8)
        ramp = rng.choice([None, BatchRamp(2, 2, rng.randint(1, 300))])
        source = BatchSource(
            samples, seed=0, fingerprint="", global_batch_size=final, micro_batch_size=1, ramp=ramp,
            skips=Skips.parse(",".join(f"{first}-{last}" for first, last in ranges)),
        )  # fmt: skip
        steps, place = rng.randint(0, 100), rng.randint(0, 400)
        position = Position(place, 3, steps)
        walked, step = position.place, steps
        while any(first <= step <= last for first, last in ranges):
            walked += ramp.size_at(walked, final) if ramp else final
            step += 1
        ids = source.sample_ids(position)
        assert ids[0] == walked
        assert source.after(position) == Position(place + len(ids), walked - place, step + 1)


@pytest.mark.parametrize("ramp", [None, BatchRamp(2, 2, 10**15)])
def test_a_huge_range_takes_no_time(ramp: BatchRamp | None) -> None:
    samples: Any = SimpleNamespace(sample_ids=lambda places, **fixed: places)
    source = BatchSource(
        samples, seed=0, fingerprint="", global_batch_size=8, micro_batch_size=1, ramp=ramp,
        skips=Skips.parse(f"0-{10**9 - 1}"),
    )  # fmt: skip
    begin = 10**9 * (2 if ramp else 8)
    assert source.sample_ids(Position())[0] == begin
    assert source.after(Position()).steps == 10**9 + 1


def test_an_evaluation_reads_every_dataset_and_nothing_twice(tmp_path: Path) -> None:
    samples = blended(tmp_path)  # 20, 8 and 3 samples at weights 2, 1, 1
    assert samples.num_held_out == 12  # a quarter of them are the third dataset's 3
    ids = samples.held_out_ids(100)
    assert len(set(ids.tolist())) == 12
    owners = np.searchsorted([20, 28], ids, side="right")
    assert np.bincount(owners).tolist() == [6, 3, 3]
    assert sorted(ids[owners == 0]) == [0, 3, 6, 10, 13, 16], "spread over the first one's 20"
    batches = EvaluationBatches(
        samples, num_samples=36, global_batch_size=4, micro_batch_size=4,
    )  # fmt: skip
    assert batches.num_batches == 3
    assert batches.sample_ids(0).tolist() == ids[:4].tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no dataset"),
        ("data/web", "expected a positive weight and a path"),
        ("0 data/web", "expected a positive weight"),
        ("0.5 a; 0.5", "expected a positive weight and a path"),
    ],
)
def test_bad_blends(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_blend(text)


def prepared(folder: Path, name: str, texts: int, tokenizer: Path | None = None) -> PreparedCorpus:
    source = folder / f"{name}.jsonl"
    lines = (json.dumps({"text": f"{name} {number} " * 40}) for number in range(texts))
    source.write_text("\n".join(lines))
    own = None if tokenizer is None else str(tokenizer)
    return prepare(source, folder / "cache", tokenizer_path=own, validation_fraction=0.3, seed=0)


def test_blends_of_prepared_corpora(tmp_path: Path) -> None:
    one = prepared(tmp_path, "one", 60)
    two = prepared(tmp_path, "two", 30, Path(one.tokenizer_path))
    text = f"3 {one.directory}; 1 {two.directory}"
    blend = load_blend(text)
    assert blend.vocab_size == one.vocab_size
    assert blend.train_tokens == one.train_tokens + two.train_tokens
    assert blend.fingerprint != load_blend(text.replace("3 ", "2 ", 1)).fingerprint
    assert blend.identity()["source"].startswith("3.0 ")
    samples = open_samples(blend, "train", 16)
    ids = samples.sample_ids(np.arange(40), seed=1, fingerprint=blend.fingerprint)
    own = TokenSamples(one.train_prefix, 16).num_samples
    assert int((ids < own).sum()) == 30
    assert open_samples(blend, "validation", 16).num_samples < samples.num_samples
    other = prepared(tmp_path, "other", 30)
    with pytest.raises(DataError, match="another tokenizer than"):
        load_blend(f"1 {one.directory}; 1 {other.directory}")
