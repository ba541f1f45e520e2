"""Prepare a large corpus from start to end: `prepare_bulk`."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from hysparse_megatron.data.bulk.assemble import (
    Assembled,
    Shards,
    assemble,
    count_documents,
)
from hysparse_megatron.data.bulk.index_writer import token_dtype
from hysparse_megatron.data.bulk.journal import WorkFolder, read_request
from hysparse_megatron.data.bulk.pool import run_units
from hysparse_megatron.data.bulk.progress import Progress
from hysparse_megatron.data.bulk.shards import ShardRecord
from hysparse_megatron.data.bulk.sources import list_sources
from hysparse_megatron.data.bulk.tokenizers import Encoder, TokenizerChoice
from hysparse_megatron.data.bulk.units import cut_units, default_unit_bytes
from hysparse_megatron.data.bulk.worker import WorkerOptions, too_many_bad
from hysparse_megatron.data.cache import locked
from hysparse_megatron.data.card import CARD_NAME, PreparedCorpus, load_prepared, write_card
from hysparse_megatron.errors import ConfigError, DataError
from hysparse_megatron.files import sync_folder

BULK_FORMAT = 1
"""Changes when the same request would give other shards."""
MAX_DOCUMENT_BYTES = 64 * 1024 * 1024
"""A longer JSON line is bad: a worker holds a document, and several copies of it, in memory."""

_CARD_SAMPLES = 10
_CARD_SOURCES = 1000


@dataclass(frozen=True)
class BulkRequest:
    """What decides the prepared files.

    Attributes:
        inputs: files and folders, see `list_sources`.
        output: the folder to make. Beside it lie `OUTPUT.work`, until it is done, and a lock.
        tokenizer: see `choose_tokenizer`.
        kind: of all files, see `list_sources`.
        text_key: field of a JSON line, or column, that holds the text.
        validation_fraction, seed: see `held_out`; the fraction is < 1, and 0 holds out none.
        deduplicate: leave out documents whose text came before.
        max_document_bytes: longer documents are bad; text files may have any length.
        unit_bytes: see `cut_units`; None goes by the size of the corpus.
    """

    inputs: tuple[str, ...]
    output: str
    tokenizer: TokenizerChoice
    kind: str | None = None
    text_key: str = "text"
    validation_fraction: float = 0.01
    seed: int = 1234
    deduplicate: bool = False
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    unit_bytes: int | None = None

    def options(self) -> dict[str, Any]:
        """What shapes the result, apart from the files and the tokenizer."""
        return {
            "kind": self.kind,
            "text_key": self.text_key,
            "validation_fraction": self.validation_fraction,
            "seed": self.seed,
            "deduplicate": self.deduplicate,
            "max_document_bytes": self.max_document_bytes,
            "unit_bytes": self.unit_bytes,
            "end_of_document": self.tokenizer.end_of_document,
        }


def prepare_bulk(
    request: BulkRequest,
    *,
    workers: int,
    max_bad: int | None = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PreparedCorpus:
    """Tokenize a corpus of any size into a folder for training.

    Killed at any time and called again, it goes on where it was and gives the same files. A folder
    that is there already is kept if it was made for this request.

    Args:
        request: what is wanted.
        workers: processes, 0 for this one alone; the result does not depend on their number.
        max_bad: bad documents to leave out before the corpus is refused; None for any number.
        overwrite: prepare even if the output is there, or an unfinished preparation of another
            request, and replace it.
        progress: shows how far it is.

    Raises:
        ConfigError: the output belongs to another request, or a package is missing.
        DataError: bad, missing or changed input, another process prepares the same output, or it
            cannot be written (names the path).
        HySparseError: a worker was killed.
    """
    with ExitStack() as stack:
        progress = progress or stack.enter_context(Progress(is_quiet=True))
        run = _Run(request, workers, max_bad, overwrite, progress)
        stack.enter_context(_write_errors(run.output))
        os.makedirs(os.path.dirname(run.output), exist_ok=True)
        stack.enter_context(locked(f"{run.output}.lock", 0.0, lambda line: None))
        if not run.is_done():
            run.prepare()
    return load_prepared(run.output, check_tokens=False)


@contextmanager
def _write_errors(output: str):
    try:
        yield
    except OSError as error:
        place = error.filename or output
        raise DataError(f"{place}: cannot write prepared data: {error.strerror}") from error


class _Run:
    """One preparation, under its lock."""

    def __init__(
        self,
        request: BulkRequest,
        workers: int,
        max_bad: int | None,
        overwrite: bool,
        progress: Progress,
    ) -> None:
        if not 0.0 <= request.validation_fraction < 1.0:
            raise ConfigError(
                f"validation fraction {request.validation_fraction} is not between 0 and 1"
            )
        self.output = os.path.abspath(request.output)
        self._request = request
        self._workers = workers
        self._max_bad = max_bad
        self._overwrite = overwrite
        self._progress = progress
        self._sources = list_sources(request.inputs, request.kind)
        self._refuse_output_inside_inputs()
        self._total_bytes = sum(source.file.size_bytes for source in self._sources)
        self._unit_bytes = request.unit_bytes or default_unit_bytes(self._total_bytes)
        self._tokenizer: Encoder = request.tokenizer.load()
        self._tokenizer_sha256 = request.tokenizer.sha256()
        self._dtype = token_dtype(self._tokenizer.vocab_size)
        self._work_path = f"{self.output}.work"

    def is_done(self) -> bool:
        """Whether the output is there already; removes what a kill left beside it.

        Raises:
            ConfigError: it is the result of another request, or no prepared data at all.
        """
        if not os.path.isdir(self.output) or not os.listdir(self.output):
            if os.path.exists(self.output) and not os.path.isdir(self.output):
                raise ConfigError(f"{self.output}: is a file; name a folder to make")
            return False
        if not os.path.isfile(os.path.join(self.output, CARD_NAME)):
            raise ConfigError(f"{self.output}: holds other files; name a new folder")
        if self._overwrite:
            return False
        if _read_request_hash(self.output) != self._request_hash():
            raise ConfigError(
                f"{self.output}: was prepared from other inputs or with other options; name a new "
                "folder, or replace it with --overwrite"
            )
        load_prepared(self.output, check_tokens=False)
        if read_request(self._work_path) == self._shard_request():
            shutil.rmtree(self._work_path)
        self._progress.note(f"{self.output}: is prepared already")
        return True

    def prepare(self) -> None:
        """Make the shards that are missing, and the output of all."""
        work = WorkFolder(
            self._work_path, self._shard_request(), self._dtype, discard=self._overwrite
        )
        try:
            self._make_shards(work)
            self._refuse_changed_sources()
            self._publish(work)
        finally:
            work.close()
        work.remove()

    def _make_shards(self, work: WorkFolder) -> None:
        done = sum(record.size_bytes for record in work.records.values())
        if work.records:
            total = self._total_bytes / 1e6
            self._progress.note(f"going on after {done / 1e6:,.0f} of {total:,.0f} MB")
        units = cut_units(
            self._sources,
            unit_bytes=self._unit_bytes,
            spill_folder=self._work_path,
            is_done=work.records.__contains__,
            is_finished=work.finished_sources().__contains__,
        )
        options = WorkerOptions(
            self._work_path,
            self._request.tokenizer,
            self._dtype,
            self._request.text_key,
            self._request.max_document_bytes,
            self._max_bad,
        )
        self._refuse_many_bad(work)
        num_warnings = 0
        self._progress.start("tokenizing", "B", self._total_bytes, done)
        for record in run_units(units, self._sources, options, workers=self._workers):
            work.add(record)
            self._progress.advance(record.size_bytes)
            if record.bad_documents:
                num_warnings += 1
                if num_warnings <= _CARD_SAMPLES:
                    self._progress.warn(f"left out: {record.bad_samples[0]}")
                self._refuse_many_bad(work)
        self._progress.end()

    def _refuse_many_bad(self, work: WorkFolder) -> None:
        found = count_documents(work.in_order()).bad
        if self._max_bad is not None and found > self._max_bad:
            raise too_many_bad(_samples(work.in_order()), found, self._max_bad)

    def _publish(self, work: WorkFolder) -> None:
        """Write the output beside its place and rename it there when it is whole."""
        records = work.in_order()
        temporary = os.path.join(self._work_path, "output")
        os.mkdir(temporary)
        self._progress.start("assembling", "tokens", sum(record.num_tokens for record in records))
        assembled = assemble(
            Shards(records, work.shard_path, self._dtype),
            temporary,
            validation_fraction=self._request.validation_fraction,
            seed=self._request.seed,
            deduplicate=self._request.deduplicate,
            advance=self._progress.advance,
        )
        self._progress.end()
        self._refuse_empty_split(records, assembled)
        with open(os.path.join(temporary, self._request.tokenizer.kept_name), "wb") as stream:
            stream.write(self._request.tokenizer.contents())
        write_card(
            temporary,
            self._card(records, assembled),
            tokenizer_name=self._request.tokenizer.kept_name,
            known_hashes=assembled.hashes,
        )
        sync_folder(temporary)
        if os.path.isdir(self.output) and os.listdir(self.output):
            os.rename(self.output, os.path.join(self._work_path, "replaced"))
        os.rename(temporary, self.output)
        sync_folder(os.path.dirname(self.output))

    def _card(self, records: Sequence[ShardRecord], assembled: Assembled) -> dict[str, Any]:
        hashes = {n: sha for record in records for n, sha in record.source_hashes.items()}
        sources = [
            {
                "name": source.file.name,
                "bytes": source.file.size_bytes,
                "sha256": hashes[str(number)],
            }
            for number, source in enumerate(self._sources)
        ]
        library, version = self._request.tokenizer.library
        counts = count_documents(records)
        return {
            "source": ", ".join(os.path.abspath(given) for given in self._request.inputs),
            "source_identity": _hash_of(sources),
            "sources": sources[:_CARD_SOURCES],
            "sources_not_listed": max(0, len(sources) - _CARD_SOURCES),
            "options": self._request.options(),
            "request": self._request_hash(),
            "tokenizer_kind": self._request.tokenizer.kind,
            "vocab_size": self._tokenizer.vocab_size,
            "end_of_document": self._tokenizer.end_of_document,
            "text_bytes": counts.text_bytes,
            "empty_documents": counts.empty,
            "bad_documents": counts.bad,
            "bad_samples": _samples(records),
            "duplicate_documents": assembled.duplicate_documents,
            "train_documents": assembled.train_documents,
            "validation_documents": assembled.validation_documents,
            "train_tokens": assembled.train_tokens,
            "validation_tokens": assembled.validation_tokens,
            "versions": {"python": platform.python_version(), library: version},
        }

    def _shard_request(self) -> dict[str, Any]:
        """What decides the shards; options of the assembly may change before it."""
        later = ("validation_fraction", "seed", "deduplicate")
        options = {n: v for n, v in self._request.options().items() if n not in later}
        library, version = self._request.tokenizer.library
        listing = [
            [s.path, s.kind, s.file.size_bytes, s.file.modified_nanoseconds] for s in self._sources
        ]
        return {
            "format": BULK_FORMAT,
            **options,
            "unit_bytes": self._unit_bytes,
            "tokenizer_sha256": self._tokenizer_sha256,
            library: version,
            "input files_sha256": _hash_of(listing),
        }

    def _request_hash(self) -> str:
        """Of all that shapes the result and can be known without reading the files."""
        library, version = self._request.tokenizer.library
        listing = [[s.file.name, s.kind, s.file.size_bytes] for s in self._sources]
        parts = [BULK_FORMAT, self._request.options(), self._tokenizer_sha256, library, version]
        return _hash_of([*parts, listing])

    def _refuse_output_inside_inputs(self) -> None:
        output = os.path.realpath(self.output)
        for given in self._request.inputs:
            source = os.path.realpath(given)
            if os.path.commonpath([source, output]) == source:
                raise ConfigError(f"{self.output}: lies inside the input {given}; name another")

    def _refuse_changed_sources(self) -> None:
        if list_sources(self._request.inputs, self._request.kind) != self._sources:
            raise DataError(
                f"{', '.join(self._request.inputs)}: files changed while they were read; start "
                "again with --overwrite"
            )

    def _refuse_empty_split(self, records: Sequence[ShardRecord], assembled: Assembled) -> None:
        for split, found in (
            ("train", assembled.train_documents),
            ("validation", assembled.validation_documents),
        ):
            if not found and (split == "train" or self._request.validation_fraction):
                count = count_documents(records).good - assembled.duplicate_documents
                raise DataError(
                    f"{', '.join(self._request.inputs)}: none of {count} document(s) with text "
                    f"fell into the {split} split; use more documents (a .jsonl file holds one "
                    "per line), another --validation-fraction or another --seed; or hold out none "
                    "by --validation-fraction 0, to train with train.eval_batches=0"
                )


def _samples(records: Sequence[ShardRecord]) -> list[str]:
    """Messages of the first bad documents."""
    samples = [sample for record in records for sample in record.bad_samples]
    return samples[:_CARD_SAMPLES]


def _hash_of(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _read_request_hash(directory: str) -> str | None:
    try:
        with open(os.path.join(directory, CARD_NAME), "rb") as stream:
            value = json.load(stream).get("request")
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, str) else None
