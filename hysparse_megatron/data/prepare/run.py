"""Prepare a corpus from start to end: `prepare`."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import platform
import secrets
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from hysparse_megatron.data import content
from hysparse_megatron.data.card import CARD_NAME, SPLITS, PreparedCorpus, card_of, load_prepared
from hysparse_megatron.data.lock import locked
from hysparse_megatron.data.places import is_local
from hysparse_megatron.data.prepare.assemble import Assembled, assemble
from hysparse_megatron.data.prepare.executors import Executor, remove_remains
from hysparse_megatron.data.prepare.finished import (
    entries_of,
    refuse_inputs_inside,
    refuse_other_contents,
    refuse_other_files,
    versions_entry,
)
from hysparse_megatron.data.prepare.progress import Progress
from hysparse_megatron.data.prepare.request import PrepareRequest, hash_of, place_tokenizer
from hysparse_megatron.data.prepare.shards import MAX_SAMPLES, UNWRITABLE, Folder, Record, Work
from hysparse_megatron.data.prepare.sources import cut_units
from hysparse_megatron.data.prepare.tokenize import tokenize_share, too_many_bad
from hysparse_megatron.errors import ConfigError, DataError
from hysparse_megatron.files import naming, sync_folder

_CARD_SOURCES = 1000


def prepare(
    request: PrepareRequest,
    *,
    executor: Executor | None = None,
    max_bad: int | None = 0,
    overwrite: bool = False,
    repair: bool = False,
    compare_inputs: bool = False,
    lock_timeout_seconds: float = 0.0,
    progress: Progress | None = None,
) -> PreparedCorpus | None:
    """Tokenize a corpus of any size into a folder for training.

    Killed at any time and called again, it goes on where it was and gives the same files. A folder
    that is there already is kept if it was made for this request.

    Args:
        executor: who makes the shards; None for this process alone. The result does not depend on
            it.
        max_bad: bad documents to leave out before the corpus is refused; None for any number.
        overwrite: prepare even if the output is there, or an unfinished preparation of another
            request, and replace it.
        repair: prepare again what is there and damaged.
        compare_inputs: read also inputs above 1 GB, whose times agree, to find that an output is
            theirs.
        lock_timeout_seconds: longest wait for another process that makes the same output and gets
            no further.
        progress: shows how far it is.

    Returns:
        The prepared corpus, or None for an output on another file system, which training cannot
        read before it is copied.

    Raises:
        ConfigError: the output belongs to another request, or holds inputs, or other files where it
            would be replaced; see `PrepareRequest.check`; a package is missing.
        DataError: bad, missing or changed input, another process prepares the same output, or it
            cannot be written (names the path).
        HySparseError: a process of the executor was lost.
    """
    request.check()
    output = Folder(_own_place(request.output))
    progress = progress or Progress(is_quiet=True)
    with naming(output.path, UNWRITABLE):
        lock: AbstractContextManager[bool] = nullcontext(True)
        if output.is_local:
            refuse_inputs_inside(output.path, request.sources)
            os.makedirs(os.path.dirname(output.path), exist_ok=True)
            lock = locked(
                f"{output.path}.lock",
                lock_timeout_seconds,
                progress.note,
                functools.partial(_last_change, f"{output.path}.work"),
            )
        with lock as is_locked:
            # Without locks two processes may do the same, each in a folder of its own.
            suffix = ".work" if is_locked else f".work-{secrets.token_hex(4)}"
            work_folder = Folder(f"{output.path}{suffix}")
            run = _Run(request, output, work_folder, max_bad, overwrite, repair, progress)
            if not run.is_done(compare_inputs):
                run.prepare(executor)
    return load_prepared(output.path, check_tokens=False) if output.is_local else None


def _last_change(folder: str) -> int | None:
    """When something began or was done in a work folder, in ns; None if it is not there."""
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return None


def _own_place(output: str) -> str:
    """The folder that a link may stand for: no other one can be put in the place of a link.

    Raises ConfigError: nor in the place of a file system.
    """
    if not is_local(output):
        return output
    path = os.path.abspath(output)
    path = os.path.realpath(path) if os.path.islink(path) else path
    if os.path.ismount(path):
        raise ConfigError(f"{path}: is where a file system begins; name a folder in it")
    return path


@dataclass
class _Run:
    """One preparation, under its lock."""

    request: PrepareRequest
    output: Folder
    work_folder: Folder
    max_bad: int | None
    overwrite: bool
    repair: bool
    progress: Progress

    def is_done(self, compare_inputs: bool) -> bool:
        """Whether the output is there already; removes what a kill left beside it.

        Raises:
            ConfigError: it is the result of another request, or no prepared data at all.
            DataError: more documents were left out of it than are allowed now.
        """
        path, is_local = self.output.path, self.output.is_local
        if os.path.isfile(path):
            raise ConfigError(f"{path}: is a file; name a folder to make")
        names, unfinished = self.output.names(), self._unfinished()
        if CARD_NAME not in names:
            if names and not self.repair and (unfinished is None or is_local):
                raise ConfigError(f"{path}: holds other files; name a new folder")
            refuse_other_files(self.output)
            return False
        if self.overwrite:
            refuse_other_files(self.output)
            return False
        try:
            if is_local:
                load_prepared(path, check_tokens=False)
        except DataError as error:
            if not self.repair:
                raise
            refuse_other_files(self.output)
            self.progress.note(f"rebuilding damaged {path}: {error}")
            return False
        card = self.output.read_json(CARD_NAME)
        if card.get("request") != self.request.identity():
            raise ConfigError(
                f"{path}: was prepared from other inputs or with other options; name a new "
                "folder, or replace it with --overwrite"
            )
        note = self.progress.note
        refuse_other_contents(path, card, self.request.sources, compare_inputs, note)
        self._refuse_bad(card["bad_documents"], card.get("bad_samples", []))
        if unfinished is not None:
            self.work_folder.remove()
        note(f"{path}: is prepared already")
        return True

    def _unfinished(self) -> dict[str, Any] | None:
        """What an unfinished preparation was asked for; None if there is none."""
        names = self.work_folder.names()
        try:
            found: dict[str, Any] = self.work_folder.read_json("request.json")
        except (OSError, ValueError) as error:
            # A kill may come while the first file is written.
            if not all(name.startswith("request.json") for name in names):
                raise ConfigError(f"{self.work_folder.path}: holds other files") from error
            return None
        return found

    def prepare(self, executor: Executor | None) -> None:
        """Make the shards that are missing, and the output of all."""
        work = self._work()
        done = work.done()
        total = sum(map(work.unit_bytes, range(len(work.units))))
        already = sum(map(work.unit_bytes, done))
        if done:
            self.progress.note(f"going on after {already / 1e6:,.0f} of {total / 1e6:,.0f} MB")
        self.progress.start("tokenizing", "B", total, already)
        if executor is None:
            tokenize_share(work, 0, 1, self.progress.advance)
        else:
            executor.run(work, self.progress.advance)
        self.progress.close()
        records = work.records()
        bad, samples = sum(record.bad_documents for record in records), _samples(records)
        self._refuse_bad(bad, samples)
        warnings = [f"WARNING: {line}" for record in records for line in record.warnings]
        for line in [f"left out: {sample}" for sample in samples] + warnings[:MAX_SAMPLES]:
            self.progress.warn(line)
        self._refuse_changed_sources()
        self._publish(work, records)
        self.work_folder.remove()

    def _refuse_bad(self, bad: int, samples: list[str]) -> None:
        if self.max_bad is not None and bad > self.max_bad:
            raise too_many_bad(samples, bad, self.max_bad)

    def _work(self) -> Work:
        """What is to be done, or what is left of it."""
        request, folder = self.request, self.work_folder
        files = [[s.path, s.kind, s.size_bytes, s.version] for s in request.sources]
        wanted = {**request.shard_options(), "input files": hash_of(files)}
        before = self._unfinished()
        if before is not None and before != wanted:
            is_begun = any(name.endswith(".shard") for name in folder.names())
            if is_begun and not self.overwrite:
                changed = [
                    f"{name} changed"
                    if name.endswith(("files", "sha256"))
                    else f"{name}: {before.get(name)!r} -> {wanted.get(name)!r}"
                    for name in {**before, **wanted}
                    if before.get(name) != wanted.get(name)
                ]
                raise ConfigError(
                    f"{folder.path}: an unfinished preparation with other settings "
                    f"({'; '.join(changed)}); start again with --overwrite"
                )
            folder.remove()
        folder.make()
        remove_remains(folder)
        folder.write("request.json", json.dumps(wanted).encode())
        work = Work(
            folder.path,
            list(request.sources),
            cut_units(request.sources, request.unit_bytes),
            place_tokenizer(request, folder, self.progress.note),
            request.text_key,
            request.max_document_bytes,
            self.max_bad,
        )
        work.save()
        return work

    def _refuse_changed_sources(self) -> None:
        for source in self.request.sources:
            if source.is_local:
                try:
                    status = os.stat(source.path)
                    now = (status.st_size, str(status.st_mtime_ns))
                except OSError:
                    now = (-1, "")
                if now != (source.size_bytes, source.version):
                    raise DataError(
                        f"{source.path}: changed while it was read; start again with --overwrite"
                    )

    def _publish(self, work: Work, records: Sequence[Record]) -> None:
        """Write the output, the card last: a folder without a card is not finished.

        A local one is written beside its place and renamed when it is whole.
        """
        encoder, target = work.tokenizer.load(), self.output
        if target.is_local:
            target = Folder(f"{self.work_folder.path}/output")
            target.remove()
        elif CARD_NAME in target.names():
            target.remove(CARD_NAME)
        target.make()
        self.progress.start("assembling", "tokens", sum(record.num_tokens for record in records))
        splitting = self.request.splitting()
        made = assemble(work, records, target, splitting, encoder, self.progress.advance)
        self.progress.close()
        if made.cut is not None:
            self.progress.note(
                "too few documents for two splits: the longest is cut after "
                f"{made.cut.place:,} tokens, and what follows is held out; its copies are left out"
            )
        held_out = self.request.validation_fraction
        for split, wanted in (("train", held_out < 1), ("validation", held_out > 0)):
            if wanted and not made.documents[split]:
                count = sum(record.num_documents for record in records) - made.duplicates
                raise DataError(
                    f"{self.request.description}: none of {count} document(s) with text fell into "
                    f"the {split} split; use more text (a .jsonl file holds a document in each "
                    "line), or hold out none, by a validation fraction of 0, to train with "
                    "train.eval_batches=0"
                )
        name, contents = work.tokenizer.kept_name, work.tokenizer.contents()
        target.write(name, contents)
        for beside, published in work.tokenizer.published_with().items():
            target.write(beside, published)
        files = dict(made.files)
        files[name] = {"bytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}
        for file, entry in files.items() if target.is_local else ():
            if blocks := content.hash_blocks(os.path.join(target.path, file)):
                entry["blocks_sha256"] = blocks
        names = ("vocab_size", "end_of_document", "begin_of_document")
        facts = {name: getattr(encoder, name) for name in names}
        card = card_of(self._facts(work, records, made) | facts, files)
        text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
        # JSON writes the same for bytes of a file's name that are no UTF-8.
        target.write(CARD_NAME, text.encode(errors="backslashreplace"))
        if target.is_local:
            self._put_in_place(target.path)
        self.progress.note(
            f"{self.output.path}: {card['train_tokens']:,} training and "
            f"{card['validation_tokens']:,} validation tokens in "
            f"{card['train_documents'] + card['validation_documents']:,} documents "
            f"({card['empty_documents']:,} empty and {card['bad_documents']:,} bad left out), "
            f"vocabulary {card['vocab_size']:,}, fingerprint {card['fingerprint'][:12]}"
        )

    def _put_in_place(self, made: str) -> None:
        sync_folder(made)
        if os.path.isdir(self.output.path) and os.listdir(self.output.path):
            refuse_other_files(self.output)  # hours after it was looked at first
            os.rename(self.output.path, os.path.join(self.work_folder.path, "replaced"))
        try:
            os.rename(made, self.output.path)
        except OSError as error:
            # Without a lock another process may have been first.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync_folder(os.path.dirname(self.output.path))

    def _facts(self, work: Work, records: Sequence[Record], made: Assembled) -> dict[str, Any]:
        hashes = {int(n): sha for record in records for n, sha in record.source_hashes.items()}
        sources = entries_of(self.request.sources, hashes)
        library, version = work.tokenizer.library
        return {
            "source": self.request.description,
            "source_identity": hash_of(sources),
            **versions_entry(self.request.sources),
            "sources": sources[:_CARD_SOURCES],
            "sources_not_listed": max(0, len(sources) - _CARD_SOURCES),
            "options": self.request.shard_options() | asdict(self.request.splitting()),
            "request": self.request.identity(),
            "tokenizer_kind": work.tokenizer.kind,
            "largest_id": max((record.largest_id for record in records), default=-1),
            "text_bytes": sum(record.text_bytes for record in records),
            "empty_documents": sum(record.empty_documents for record in records),
            "bad_documents": sum(record.bad_documents for record in records),
            "bad_samples": _samples(records),
            "duplicate_documents": made.duplicates,
            "cut": None if made.cut is None else asdict(made.cut),
            **{f"{split}_documents": made.documents[split] for split in SPLITS},
            **{f"{split}_tokens": made.tokens[split] for split in SPLITS},
            "versions": {"python": platform.python_version(), library: version},
        }


def _samples(records: Sequence[Record]) -> list[str]:
    found = [sample for record in records for sample in record.bad_samples]
    return found[:MAX_SAMPLES]
