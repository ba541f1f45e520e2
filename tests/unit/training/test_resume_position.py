"""Where a run goes on in the order of its samples, by what a manifest says."""

import dataclasses
import random
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import Config
from hysparse_megatron.data.read.order import Position
from hysparse_megatron.data.sources import changed_fields
from hysparse_megatron.errors import CheckpointError, DataError
from hysparse_megatron.training.loop import Progress
from hysparse_megatron.training.resume import (
    check_data,
    check_tokenizer,
    progress_of,
    warn_of_past_skips,
)


@pytest.fixture(scope="module")
def config() -> Config:
    return compose(["data.skip_steps='3-5,20'", "train.seq_length=64", "train.global_batch_size=4"])


def test_a_position_comes_back(config: Config, seed: int) -> None:
    draw = random.Random(seed)
    position = Position(*(draw.randint(0, 10**9) for _ in range(3)))
    facts = {"position": asdict(position), "guard": {}}
    assert progress_of(config, 7, {"progress": facts}) == Progress(7, position, facts)


def test_early_versions_said_tokens(config: Config) -> None:
    """All batches had one size: the one of then, whatever it is today."""
    found = progress_of(config, 10, {"tokens": 10 * 8 * 64})
    assert found == Progress(10, Position(samples=80, left_out=3 * 8, steps=13))
    assert progress_of(config, 2, {"tokens": 2 * 8 * 64}).position == Position(16, 0, 2)
    # What is left out next takes the batch size of today.
    assert progress_of(config, 3, {"tokens": 3 * 8 * 64}).position == Position(24, 0, 3)
    assert progress_of(config, 0, {"tokens": 0}).position == Position()


@pytest.mark.parametrize(
    "manifest", [{}, {"progress": {"position": {"of_another_version": 3}}}, {"tokens": None}]
)
def test_a_manifest_without_a_position(config: Config, manifest: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="step 7 does not say how many samples"):
        progress_of(config, 7, manifest)


@pytest.mark.parametrize(
    ("step", "steps", "trained_on"),
    [(2, 2, 0), (3, 6, 0), (6, 6, 3), (5, 6, 2), (25, 28, 1), (25, 29, 0), (25, 25, 4)],
)
def test_skips_that_come_too_late_are_told(
    config: Config, step: int, steps: int, trained_on: int
) -> None:
    told: list[str] = []
    warn_of_past_skips(config, Progress(step, Position(steps=steps)), told.append)
    assert len(told) == (trained_on > 0)
    assert all(f"names {trained_on} steps that this run has trained on" in text for text in told)


def test_weights_of_another_tokenizer(config: Config, tmp_path: Path) -> None:
    """Ids of one say other text than those of another, and nothing else would tell."""
    corpus: Any = SimpleNamespace(
        tokenizer_path="/data/tokenizer.json", identity=lambda: {"tokenizer_sha256": "a" * 64}
    )
    for known in ({}, {"data": {}}, {"data": {"tokenizer_sha256": "a" * 64}}):
        assert check_tokenizer(config, tmp_path, known, corpus) == []
    for key in ("data", "tokenizer"):  # of a run, and of weights from elsewhere
        other = {key: {"tokenizer_sha256": "b" * 64}}
        told = r"another tokenizer \(SHA-256 bbb.* than /data/tokenizer\.json \(aaa"
        with pytest.raises(DataError, match=told) as caught:
            check_tokenizer(config, tmp_path, other, corpus)
        assert "data.tokenizer" in str(caught.value)
        (warning,) = check_tokenizer(accepting(config), tmp_path, other, corpus)
        assert re.search(told, warning)


def of(fingerprint: str) -> Any:
    """Data with that fingerprint."""
    return SimpleNamespace(identity=lambda: {"fingerprint": fingerprint})


def accepting(config: Config) -> Config:
    """As `config`, but for changed data."""
    return dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, accept_changed_data=True)
    )


def test_a_set_of_another_text_by_the_name_of_one(config: Config, tmp_path: Path) -> None:
    """Its losses would go on in the other's curve; sets that come and go are no change."""
    manifest = {
        "data": of("train").identity(),
        "evaluation_data": {name: of(name).identity() for name in ("web", "gone")},
    }
    corpus, same = of("train"), {"web": of("web"), "new": of("any")}
    assert check_data(config, tmp_path, manifest, corpus, same) == []
    early = {"data": manifest["data"]}
    assert check_data(config, tmp_path, early, corpus, {"web": of("other")}) == []

    changed = {**same, "web": of("other")}
    told = r"data\.evaluation\.web changed since \S+ was written: fingerprint: web -> other\. "
    with pytest.raises(DataError, match=told) as caught:
        check_data(config, tmp_path, manifest, corpus, changed)
    assert "or give it another name" in str(caught.value)
    both = check_data(accepting(config), tmp_path, manifest, of("text"), changed)
    assert [line.split(" changed")[0] for line in both] == ["the data", "data.evaluation.web"]
    with pytest.raises(DataError, match=r"^the data changed .* checkpoint\.load="):
        check_data(config, tmp_path, manifest, of("text"), changed)


def test_the_same_tokens_made_elsewhere_are_the_same_data() -> None:
    before = {"fingerprint": "f", "source": "/old/text", "train_tokens": 7}
    assert changed_fields(before, {**before, "source": "/new/text"}) == []
    now = {"fingerprint": "g", "source": "/new/text", "train_tokens": 7}
    assert changed_fields(before, now) == [
        "fingerprint: f -> g",
        "source: /old/text -> /new/text",
    ]
