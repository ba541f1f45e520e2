"""Corpora and requests for the tests of preparation."""

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import sentencepiece
from backports import zstd
from tiny_corpora import WORDS
from tokenizers.processors import TemplateProcessing

from hysparse_megatron.data.card import PreparedCorpus
from hysparse_megatron.data.prepare import run
from hysparse_megatron.data.prepare.request import PrepareRequest, sources_of
from hysparse_megatron.data.read.indexed import open_indexed
from hysparse_megatron.data.tokenizer import END_OF_DOCUMENT, train_tokenizer
from hysparse_megatron.data.tokenizer_choice import choose_tokenizer

UNIT_BYTES = 4096


def make_texts(count: int, seed: int = 0, longest_words: int = 120) -> list[str]:
    """Texts of several lines; number n starts with `n:`."""
    generator = random.Random(seed)
    return [
        f"{number}: "
        + " ".join(
            generator.choice(WORDS) + ("\n" if generator.random() < 0.1 else "")
            for _ in range(generator.randint(1, longest_words))
        )
        for number in range(count)
    ]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def save_tokenizer(path: Path, vocab_size: int = 400) -> Path:
    train_tokenizer(make_texts(50), vocab_size).save(str(path))
    return path


def save_beginning_tokenizer(path: Path, template: str = "<s> $A") -> Path:
    """One that puts `<s>` before every text, as Llama's do; or what else the template says."""
    tokenizer = train_tokenizer(make_texts(50), 400)
    tokenizer.add_special_tokens(["<s>", "<t>"])
    tokens = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "<t>", END_OF_DOCUMENT)]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=tokens)
    tokenizer.save(str(path))
    return path


def save_sentencepiece(path: Path) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in make_texts(60) for line in text.splitlines()]),
        model_writer=model,
        vocab_size=120,
        model_type="bpe",
        byte_fallback=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def request(
    output: Path | str,
    *inputs: Path | str,
    tokenizer: str | Path = "bytes",
    kind: str | None = None,
    **changes: Any,
) -> PrepareRequest:
    """A request with units small enough that small corpora have many."""
    sources, description = sources_of([str(given) for given in inputs], str(output), kind)
    return PrepareRequest(
        **{
            "sources": sources,
            "description": description,
            "output": str(output),
            "tokenizer": choose_tokenizer(str(tokenizer)),
            "validation_fraction": 0.2,
            "unit_bytes": UNIT_BYTES,
            **changes,
        }
    )


def prepare(
    output: Path, *inputs: Path | str, max_bad: int | None = 0, **changes: Any
) -> PreparedCorpus:
    """Prepare in this process."""
    made = run.prepare(request(output, *inputs, **changes), max_bad=max_bad)
    assert made is not None
    return made


def documents(prefix: str) -> list[list[int]]:
    """Tokens of every document, read by Megatron."""
    indexed = open_indexed(prefix)
    return [np.array(indexed[number]).tolist() for number in range(len(indexed))]


def byte_texts(prefix: str) -> list[str]:
    """Texts of a corpus prepared with the tokenizer `bytes`."""
    found = documents(prefix)
    assert all(document[-1] == 256 for document in found)
    return [bytes(document[:-1]).decode() for document in found]


def all_texts(prepared: PreparedCorpus) -> list[str]:
    """Texts of both splits, sorted."""
    return sorted(byte_texts(prepared.train_prefix) + byte_texts(prepared.validation_prefix))


def contents(folder: Path | str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def write_arrow(folder: Path, texts: list[str]) -> Path:
    """As `datasets.save_to_disk` lays it out, in two files whose names do not sort."""
    folder.mkdir()
    names = ["data-b.arrow", "data-a.arrow"]
    for name, half in zip(names, (texts[:120], texts[120:]), strict=True):
        table = pa.table({"id": list(range(len(half))), "text": half})
        with (
            pa.OSFile(str(folder / name), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=17)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names]})
    )
    return folder


def write_parquet(
    path: Path,
    texts: list[str | None],
    row_group_size: int = 40,
    kind: pa.DataType = pa.string(),  # noqa: B008
) -> Path:
    column = pa.array(texts, pa.string())
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
    table = pa.table({"text": column, "other": ["x"] * len(texts)})
    pa.parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def write_gzip(path: Path, texts: list[str]) -> Path:
    """Two members, as `cat a.gz b.gz` makes."""
    plain = write_lines(path.parent / "plain", texts).read_bytes()
    path.write_bytes(gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]))
    return path


def write_zstd(path: Path, texts: list[str]) -> Path:
    """Two frames."""
    plain = write_lines(path.parent / "plain", texts).read_bytes()
    path.write_bytes(zstd.compress(plain[:5000]) + zstd.compress(plain[5000:]))
    return path
