"""What a run reads: one prepared corpus, or several that are blended by weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hysparse_megatron.config.schema import DataConfig
from hysparse_megatron.data.blend import parse_blend
from hysparse_megatron.data.card import PreparedCorpus, load_prepared
from hysparse_megatron.data.dataset import BlendedSamples, Samples, TokenSamples
from hysparse_megatron.data.prepare import prepare_corpus
from hysparse_megatron.errors import DataError

Progress = Callable[[str], None]
"""Is told what is being done, one line at a time."""


@dataclass(frozen=True)
class BlendedCorpus:
    """Prepared corpora of one tokenizer, read by weights. Made by `load_blend`."""

    parts: tuple[PreparedCorpus, ...]
    weights: tuple[float, ...]

    @property
    def tokenizer_path(self) -> str:
        """Of all parts."""
        return self.parts[0].tokenizer_path

    @property
    def vocab_size(self) -> int:
        """Of all parts."""
        return self.parts[0].vocab_size

    @property
    def train_tokens(self) -> int:
        """Of all parts together, every token counted once."""
        return sum(part.train_tokens for part in self.parts)

    @property
    def validation_tokens(self) -> int:
        """Of all parts together."""
        return sum(part.validation_tokens for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """Of all tokens and weights."""
        told = (f"{part.fingerprint} {weight!r}" for part, weight in self._pairs)
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    @property
    def _pairs(self) -> list[tuple[PreparedCorpus, float]]:
        return list(zip(self.parts, self.weights, strict=True))

    def identity(self) -> dict[str, str | int]:
        """As `PreparedCorpus.identity`, the parts in one line."""
        return {
            "fingerprint": self.fingerprint,
            "source": "; ".join(f"{weight} {part.source}" for part, weight in self._pairs),
            "tokenizer_sha256": self.parts[0].tokenizer_sha256,
            "vocab_size": self.vocab_size,
            "train_tokens": self.train_tokens,
            "validation_tokens": self.validation_tokens,
        }


TrainingData = PreparedCorpus | BlendedCorpus


def changed_fields(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Lines `field: old -> new` for the fields of `identity()` that differ."""
    return [
        f"{name}: {before.get(name, 'unset')} -> {now.get(name, 'unset')}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


def load_blend(text: str) -> BlendedCorpus:
    """The blend that `data.blend` describes.

    Raises:
        DataError: a folder that is not prepared or damaged, or another tokenizer in one of them.
    """
    weights, paths = zip(*parse_blend(text), strict=True)
    # Every rank would read every token, for hours: ids are looked at as samples are read.
    parts = tuple(load_prepared(path, check_tokens=False) for path in paths)
    for path, part in zip(paths, parts, strict=True):
        if part.tokenizer_sha256 != parts[0].tokenizer_sha256:
            raise DataError(
                f"{path}: prepared with another tokenizer than {paths[0]} "
                f"({part.tokenizer_sha256[:12]}, not {parts[0].tokenizer_sha256[:12]}): prepare one"
                " of them anew"
            )
    return BlendedCorpus(parts, weights)


def load_data(data: DataConfig, seed: int, progress: Progress | None = None) -> TrainingData:
    """What a run's settings name, prepared if it is not; `seed` of the split.

    Raises:
        DataError: bad, missing or too little data; see `load_blend` and `prepare_corpus`.
    """
    if data.blend is not None:
        return load_blend(data.blend)
    return prepare_corpus(
        path=data.path,
        cache_dir=data.cache_dir,
        tokenizer_path=data.tokenizer,
        vocab_size=data.tokenizer_vocab_size,
        validation_fraction=data.validation_fraction,
        seed=seed,
        text_key=data.text_key,
        progress=progress,
    )


def open_samples(data: TrainingData, split: str, seq_length: int) -> Samples:
    """Samples of S + 1 tokens of a split, "train" or "validation"; see `TokenSamples`."""
    if isinstance(data, BlendedCorpus):
        samples = [open_samples(part, split, seq_length) for part in data.parts]
        prints = [part.fingerprint for part in data.parts]
        return BlendedSamples(samples, prints, data.weights)  # type: ignore[arg-type]
    prefix = data.train_prefix if split == "train" else data.validation_prefix
    return TokenSamples(prefix, seq_length, data.vocab_size)
