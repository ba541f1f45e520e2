"""Tools evaluate on the samples of the run's own evaluations."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from hysparse_megatron.config.compose import compose
from hysparse_megatron.data.read.held_out import EvaluationBatches
from hysparse_megatron.data.sources import load_data, open_samples
from hysparse_megatron.data.tokenizer import NO_TOKEN, train_tokenizer
from hysparse_megatron.errors import DataError
from hysparse_megatron.evaluation.held_out import held_out_batches
from tests.unit.single_process import default_group

LENGTH = 16


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_the_same_samples_as_in_training(tmp_path: Path, batch_size: int) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "{number} {"word " * 30}"}}\n' for number in range(60)))
    config = compose(
        [
            f"data.path={text}",
            f"data.cache_dir={tmp_path / 'cache'}",
            "data.tokenizer_vocab_size=300",
            "data.validation_fraction=0.3",
        ]
    )
    corpus = load_data(config.data)
    in_training = EvaluationBatches(
        open_samples(corpus, "validation", LENGTH),
        num_samples=8,
        global_batch_size=4,
        micro_batch_size=4,
    )
    loaded: Any = SimpleNamespace(
        config=config,
        tokenizer_sha256=corpus.identity()["tokenizer_sha256"],
        vocab_size=corpus.vocab_size,
        checkpoint=tmp_path,
        data=corpus.identity(),
        held_out={},
    )
    told: list[str] = []
    with default_group():
        found = held_out_batches(loaded, LENGTH, 8, batch_size, note=told.append)
        assert told == []
        loaded.data = {**loaded.data, "fingerprint": "another"}
        held_out_batches(loaded, LENGTH, 8, batch_size, note=told.append)
    assert "not those that the checkpoint was trained on" in told[0]
    loaded.data = corpus.identity()
    other = str(shutil.copy(text, tmp_path / "other.jsonl"))
    with default_group():
        del told[:]
        held_out_batches(loaded, LENGTH, 8, batch_size, other, told.append)
        shutil.rmtree(corpus.directory)
        held_out_batches(loaded, LENGTH, 8, batch_size, other, told.append)
        loaded.data["end_of_document"] = 5
        with pytest.raises(DataError, match="end with token 0, in training with 5"):
            held_out_batches(loaded, LENGTH, 8, batch_size, other)
    assert f"{corpus.directory} was made of other.jsonl as well" in told[0]
    assert "whether the model was trained on this text as well is not known" in told[1]
    assert ids(found) == ids(in_training)
    assert len(ids(found)) == 8


@pytest.mark.parametrize("begins", [True, False])
def test_text_begins_as_in_training(tmp_path: Path, begins: bool) -> None:
    """Earlier versions gave no text the token that the tokenizer begins one with."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "{number} {"word " * 30}"}}\n' for number in range(60)))
    tokenizer = train_tokenizer([text.read_text()], 300)
    tokenizer.add_special_tokens(["<s>"])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = [f"data.tokenizer={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}"]
    config = compose([f"data.path={text}", "data.validation_fraction=0.3", *settings])
    corpus = load_data(config.data, begin_of_document=None if begins else NO_TOKEN)
    assert corpus.begin_of_document == (begin if begins else None)
    loaded: Any = SimpleNamespace(
        config=config,
        tokenizer_sha256=corpus.identity()["tokenizer_sha256"],
        vocab_size=corpus.vocab_size,
        checkpoint=tmp_path,
        data=corpus.identity(),
        held_out={},
    )
    told: list[str] = []
    other = str(shutil.copy(text, tmp_path / "other.jsonl"))
    with default_group():
        for data in (None, other):
            found = held_out_batches(loaded, LENGTH, 8, 8, data, told.append)
            tokens = next(found.microbatches(0))["tokens"]
            assert bool((tokens == begin).any()) == begins
        assert [line for line in told if "not those" in line] == []
        loaded.data |= {"begin_of_document": 5}
        with pytest.raises(DataError, match=rf"begin with token {begin}, in training with token 5"):
            held_out_batches(loaded, LENGTH, 8, 8, other)


def ids(batches: EvaluationBatches) -> list[int]:
    """Of the samples that count."""
    read = [number for batch in range(batches.num_batches) for number in batches.sample_ids(batch)]
    return read[: batches.num_samples]
