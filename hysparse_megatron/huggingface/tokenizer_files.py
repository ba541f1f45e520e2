"""The tokenizer of a model: where a run has it, and the files that transformers reads."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hysparse_megatron.config.schema import DataConfig
from hysparse_megatron.data.card import SENTENCEPIECE_NAME, TOKENIZER_NAME
from hysparse_megatron.data.run_tokenizer import find_run_tokenizer
from hysparse_megatron.data.tokenizer import PUBLISHED_WITH, Encoder, load_tokenizer
from hysparse_megatron.errors import ConfigError, DataError

CONFIG_NAME = "tokenizer_config.json"


def find_tokenizer(data: DataConfig, identity: dict[str, Any]) -> Path:
    """The `tokenizer.json` a run trained with: the one with the hash its checkpoint remembers.

    `identity` is what the manifest says of the data. Raises ConfigError if it is not found.
    """
    path = find_run_tokenizer(data, identity.get("tokenizer_sha256"))
    if path is None:
        raise ConfigError(
            "the tokenizer that the run trained with is not where its settings say; name its "
            f"{TOKENIZER_NAME} with --tokenizer"
        )
    if path.name == SENTENCEPIECE_NAME:
        raise ConfigError(
            f"{path} is a SentencePiece model, which this does not convert: make a "
            f"{TOKENIZER_NAME} of it with transformers and name it with --tokenizer"
        )
    return path


def check_vocabulary(
    path: Path, rows: int, log: Callable[[str], None], trained: int | None = None
) -> int:
    """Ids of the tokenizer, which must fit `rows` of an embedding and be as many as `trained`.

    Tokens that somebody added, such as a token to pad with, may lie beyond the rows, as in many
    published folders: `log` is told, and what holds one is refused where it is read. Those of the
    vocabulary itself, and the one that closes documents, occur in any text.

    Raises ConfigError if they do not fit, or the file is no tokenizer.
    """
    try:
        loaded = load_tokenizer(str(path))
    except DataError as error:
        raise ConfigError(f"tokenizer: {error}") from error
    count = loaded.vocab_size
    if trained is not None and count != trained:
        raise ConfigError(
            f"{path} has {count} token ids, but the run trained with {trained}: it is another's"
        )
    if count > rows:
        library = Tokenizer.from_file(str(path))
        added = library.get_added_tokens_decoder()
        found = f"{path} has {count} token ids, but the model {rows}"
        ids = set(library.get_vocab(with_added_tokens=True).values())
        beyond = sorted(number for number in ids if number >= rows)
        if not added.keys() >= set(beyond):
            raise ConfigError(f"{found}: it is another's")
        if loaded.end_of_document >= rows:
            end = f"{loaded.end_name} (id {loaded.end_of_document})"
            raise ConfigError(f"{found}: documents would end with {end}, which is none of them")
        if loaded.begin_of_document is not None and loaded.begin_of_document >= rows:
            begin = f"{loaded.begin_name} (id {loaded.begin_of_document})"
            raise ConfigError(f"{found}: documents would begin with {begin}, which is none of them")
        log(
            f"WARNING: {found}: the {len(beyond)} added from {added[beyond[0]].content} on cannot "
            "be used, and data or prompts that hold one are refused"
        )
    return count


def ids_without_token(path: Path, rows: int) -> list[int]:
    """Those of an embedding of `rows` that the tokenizer lacks: beyond its own, or between them."""
    known = set(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).values())
    return [number for number in range(rows) if number not in known]


def not_reproduced(path: Path) -> list[str]:
    """Tokens that the tokenizer's post-processor puts around a text, and text here does not get:
    before it all but the one that documents begin with, after it all but the one that ends them."""
    loaded = load_tokenizer(str(path))
    before, after = loaded.added_around()
    before = [] if before == loaded.begin else before
    after = [] if after == [loaded.end_of_document] else after
    library = Tokenizer.from_file(str(path))
    return [library.id_to_token(number) or f"id {number}" for number in before + after]


def warn_of_other_begin(
    path: Path, trained: Encoder, identity: Mapping[str, Any], log: Callable[[str], None]
) -> None:
    """Tell `log` where users of an exported tokenizer get other texts than the model was given.

    `identity` is of the data in training, `trained` the tokenizer that has taken it over.
    """
    before, _ = load_tokenizer(str(path)).added_around()
    if not identity or before == trained.begin:
        return
    library = Tokenizer.from_file(str(path))
    puts, began = (
        " and ".join(library.id_to_token(number) or f"id {number}" for number in ids) or "nothing"
        for ids in (before, trained.begin)
    )
    log(
        f"WARNING: {path} puts {puts} before a text, but documents began with {began} in training: "
        "prompts for the exported model must, too"
    )


def copy_tokenizer(path: Path, folder: Path) -> None:
    """Copy a `tokenizer.json`, and what was published with it."""
    shutil.copyfile(path, folder / TOKENIZER_NAME)
    for name in PUBLISHED_WITH:
        if (path.parent / name).is_file():
            shutil.copyfile(path.parent / name, folder / name)


def write_tokenizer(path: Path, folder: Path, trained: Encoder, model_max_length: int) -> None:
    """Copy a `tokenizer.json`, and what describes it: as published, or made here.

    `trained` has the ids around documents of training.
    """
    copy_tokenizer(path, folder)
    if (folder / CONFIG_NAME).exists():
        _drop_auto_map(folder / CONFIG_NAME)
    else:
        library = Tokenizer.from_file(str(path))
        end = library.id_to_token(trained.end_of_document)
        begin = trained.begin_of_document
        described = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **({} if begin is None else {"bos_token": library.id_to_token(begin)}),
            "eos_token": end,
            "pad_token": end,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_max_length": model_max_length,
        }
        write_object(folder / CONFIG_NAME, described)


def _drop_auto_map(path: Path) -> None:
    """Name no class whose code stays behind; what cannot be read is left as it was published."""
    with contextlib.suppress(ValueError):
        described = json.loads(path.read_bytes())
        if isinstance(described, dict) and described.pop("auto_map", None) is not None:
            write_object(path, described)


def write_object(path: Path, content: dict[str, Any]) -> None:
    """A JSON file, the same bytes for the same content."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
