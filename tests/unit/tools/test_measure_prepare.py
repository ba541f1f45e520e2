"""What measuring the preparation of data refuses, before it writes a corpus."""

from pathlib import Path

import pytest

from tests.captured import Call
from tools.measure_prepare import main


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--megabytes", "-1"], "--megabytes: got -1; allowed a whole number from 1"),
        (["--copies", "0"], "--copies: got 0"),
        (["--vocab-size", "10"], "a tokenizer of 10 ids: allowed are 257"),
        (["--tokenizer", "new.json"], "--tokenizer new.json: is no file"),
    ],
)
def test_mistakes(
    words: list[str], told: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in call(main, words, code=2).err
    assert not list(tmp_path.iterdir()), "a tokenizer that is not there is not made there"
