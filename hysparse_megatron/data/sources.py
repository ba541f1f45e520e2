"""What a run reads: one prepared corpus, or several that are blended by weights."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hysparse_megatron.config.blend import parse_blend
from hysparse_megatron.config.schema import DataConfig
from hysparse_megatron.data import content
from hysparse_megatron.data.card import (
    CARD_NAME,
    PreparedCorpus,
    holds_tokens,
    large_files,
    load_prepared,
    sources_of_card,
)
from hysparse_megatron.data.prepare.cached import prepare_corpus
from hysparse_megatron.data.read.blend import Blend
from hysparse_megatron.data.read.dataset import BlendedSamples, Samples, TokenSamples
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
    def end_of_document(self) -> int:
        """Of all parts."""
        return self.parts[0].end_of_document

    @property
    def begin_of_document(self) -> int | None:
        """Of all parts."""
        return self.parts[0].begin_of_document

    @property
    def num_ids(self) -> int:
        """Largest id that occurs in any part, + 1."""
        return max(part.num_ids for part in self.parts)

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
        begin = self.begin_of_document
        return {
            **({} if begin is None else {"begin_of_document": begin}),
            "fingerprint": self.fingerprint,
            "source": "; ".join(f"{weight} {part.source}" for part, weight in self._pairs),
            "tokenizer_sha256": self.parts[0].tokenizer_sha256,
            "vocab_size": self.vocab_size,
            "end_of_document": self.end_of_document,
            "train_tokens": self.train_tokens,
            "validation_tokens": self.validation_tokens,
        }


TrainingData = PreparedCorpus | BlendedCorpus


MANY_EPOCHS = 4.0
"""Text read more often teaches clearly less than new text (Muennighoff et al., 2305.16264)."""


def epochs(tokens: int, sizes: Sequence[int], weights: Sequence[float] = (1.0,)) -> float:
    """How often a run of `tokens` reads a dataset, the one of a blend that it reads most often.

    `sizes` are the training tokens of each, `weights` those of the blend.
    """
    shares = Blend(weights).shares
    return max(
        float(share) * tokens / max(1, size) for share, size in zip(shares, sizes, strict=True)
    )


def epochs_of(data: TrainingData, tokens: int) -> float:
    """`epochs` of what a run reads."""
    if isinstance(data, BlendedCorpus):
        return epochs(tokens, [part.train_tokens for part in data.parts], data.weights)
    return epochs(tokens, [data.train_tokens])


def count_of(epochs: float) -> str:
    """The number as people say it: 0.031, 2.5, 23,148."""
    return f"{epochs:,.0f}" if epochs >= 10 else f"{epochs:.2g}"


def changed_fields(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Lines `field: old -> new` for the fields of `identity()` that differ.

    None for the same tokens made of files that lie elsewhere now, or for what `before`, which may
    be an earlier version's, does not tell.
    """
    changed = [name for name in before if before[name] != now.get(name)]
    if changed == ["source"]:
        return []
    return [f"{name}: {before[name]} -> {now.get(name, 'unset')}" for name in changed]


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
        _require_same_ends(path, part, paths[0], parts[0])
    return BlendedCorpus(parts, weights)


def _require_same_ends(path: str, own: TrainingData, other: str, first: TrainingData) -> None:
    """Refuse a dataset whose documents begin or end with other tokens than the first one's."""
    if own.end_of_document != first.end_of_document:
        raise DataError(
            f"{path}: its documents end with token {own.end_of_document}, those of {other} with "
            f"{first.end_of_document}: prepare one of them anew, with --end-of-document"
        )
    if own.begin_of_document != first.begin_of_document:
        raise DataError(
            f"{path}: its documents begin with {token_text(own.begin_of_document)}, those of "
            f"{other} with {token_text(first.begin_of_document)}: prepare one of them anew, with "
            "--begin-of-document"
        )


def token_text(token_id: int | None) -> str:
    """A token that there may be, for messages."""
    return "no token of their own" if token_id is None else f"token {token_id}"


def load_data(
    data: DataConfig, progress: Progress | None = None, begin_of_document: str | None = None
) -> TrainingData:
    """What a run's settings name, prepared if it is not.

    `begin_of_document` is for text, see `TokenizerChoice`.

    Raises:
        DataError: bad, missing or too little data; see `load_blend` and `prepare_corpus`.
    """
    if data.blend is not None:
        return load_blend(data.blend)
    return prepare_corpus(data, progress=progress, begin_of_document=begin_of_document)


def load_evaluations(
    data: DataConfig, corpus: TrainingData, progress: Progress | None = None
) -> dict[str, TrainingData]:
    """The sets of `data.evaluation` by name, in the tokenizer of `corpus`; see `load_data`.

    Raises:
        DataError: one of them is bad, or was prepared with another tokenizer; says which.
    """
    found: dict[str, TrainingData] = {}
    tokenizer_sha256 = corpus.identity()["tokenizer_sha256"]
    for name, path in data.evaluation.items():
        try:
            own = load_data(with_path(data, path, corpus.tokenizer_path), progress)
        except DataError as error:
            raise DataError(f"data.evaluation.{name}: {error}") from error
        if own.identity()["tokenizer_sha256"] != tokenizer_sha256:
            raise DataError(
                f"data.evaluation.{name}: {path} was prepared with another tokenizer than the "
                f"run's; prepare it with {corpus.tokenizer_path}"
            )
        _require_same_ends(f"data.evaluation.{name}: {path}", own, "the run's data", corpus)
        warning = trained_on_too(own, _folders(corpus))
        if warning and progress:
            progress(f"WARNING: data.evaluation.{name}: {warning}")
        found[name] = own
    return found


def prepared_folders(data: DataConfig, fingerprint: str | None = None) -> list[str]:
    """Those that the settings name to be trained on, or else what text was prepared into.

    That is the entry of the cache, if it is still there, with the `fingerprint` of its tokens.
    """
    paths = [data.path] if data.blend is None else [path for _, path in parse_blend(data.blend)]
    named = [path for path in paths if path and os.path.isfile(os.path.join(path, CARD_NAME))]
    if named or fingerprint is None or not os.path.isdir(data.cache_dir):
        return named
    entries = sorted(entry.path for entry in os.scandir(data.cache_dir))
    return [path for path in entries if holds_tokens(path, fingerprint)]


def trained_on_too(own: TrainingData, folders: Iterable[str]) -> str | None:
    """What to warn of where `own` holds out text that the folders hold, which are trained on.

    None otherwise, and where cards cannot be read.
    """
    with contextlib.suppress(DataError):
        cards = [(folder, *sources_of_card(folder)) for folder in folders]
        for names, split in map(sources_of_card, _folders(own)):
            for folder, others, other_split in cards:
                if split != other_split and (both := names.keys() & others.keys()):
                    return (
                        f"{folder} was made of {names[min(both)]} as well, so that text that was "
                        "trained on counts as held out: name that folder for what it holds out"
                    )
    return None


def _folders(data: TrainingData) -> list[str]:
    parts = data.parts if isinstance(data, BlendedCorpus) else [data]
    return [part.directory for part in parts]


def check_content(
    datasets: Iterable[TrainingData], log: Callable[[str], None]
) -> content.ContentCheck:
    """Begin to compare all of what the datasets' large files hold with their cards.

    Raises:
        DataError: a card cannot be read.
    """
    folders = [folder for data in datasets for folder in _folders(data)]
    hashes = [large_files(folder) for folder in dict.fromkeys(folders)]
    return content.ContentCheck({path: sha for found in hashes for path, sha in found.items()}, log)


def with_path(data: DataConfig, path: str, tokenizer_path: str | None) -> DataConfig:
    """The settings with other data to evaluate on: a prepared folder, or text to read with that
    tokenizer, all of it but of the text that is trained on."""
    other = dataclasses.replace(data, path=path, blend=None, tokenizer=tokenizer_path)
    if os.path.isfile(os.path.join(path, CARD_NAME)):
        return dataclasses.replace(other, tokenizer=None)
    if data.path is not None and os.path.realpath(path) == os.path.realpath(data.path):
        return other
    return dataclasses.replace(other, validation_fraction=1.0)


def open_samples(data: TrainingData, split: str, seq_length: int) -> Samples:
    """Samples of S + 1 tokens of a split, "train" or "validation"; see `TokenSamples`."""
    if isinstance(data, BlendedCorpus):
        samples = [open_samples(part, split, seq_length) for part in data.parts]
        prints = [part.fingerprint for part in data.parts]
        return BlendedSamples(samples, prints, data.weights)  # type: ignore[arg-type]
    if split == "train":
        if data.train_tokens == 0:
            raise DataError(
                f"{data.source}: all of it is held out, as a set to evaluate on; train on other "
                "data, or prepare it with a smaller --validation-fraction"
            )
        return TokenSamples(data.train_prefix, seq_length, data.vocab_size)
    if data.validation_tokens < seq_length + 1:
        raise DataError(
            f"{data.source}: the validation split has {data.validation_tokens:,} tokens, fewer "
            f"than one sample of {seq_length:,} + 1; use more data, a larger "
            "data.validation_fraction or a shorter train.seq_length, or train without evaluation "
            "by train.eval_batches=0"
        )
    return TokenSamples(data.validation_prefix, seq_length, data.vocab_size)
