"""Small corpora for the data tests."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from hysparse_megatron.config.schema import DataConfig
from hysparse_megatron.data.card import PreparedCorpus
from hysparse_megatron.data.prepare.cached import prepare_corpus

WORDS = "the of and return import class naïve 東京 ж 🙂 def x = 1 + self".split()  # noqa: SIM905


def write_json_lines(path: Path, num_documents: int, seed: int = 0) -> Path:
    """Write documents of 20 to 200 words; document n starts with `n:` so tests can find it."""
    generator = random.Random(seed)
    texts = (
        f"{number}: " + " ".join(generator.choices(WORDS, k=generator.randint(20, 200)))
        for number in range(num_documents)
    )
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepare(
    path: Path | None,
    cache_dir: Path,
    *,
    tokenizer_path: str | None = None,
    vocab_size: int = 300,
    validation_fraction: float = 0.25,
    seed: int = 7,
    progress: Callable[[str], None] | None = None,
) -> PreparedCorpus:
    """`prepare_corpus` with defaults that suit small corpora."""
    data = DataConfig(
        path=None if path is None else str(path),
        cache_dir=str(cache_dir),
        tokenizer=tokenizer_path,
        tokenizer_vocab_size=vocab_size,
        validation_fraction=validation_fraction,
    )
    return prepare_corpus(data, seed, progress)
