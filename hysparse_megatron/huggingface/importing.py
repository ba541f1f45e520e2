"""From a Hugging Face folder of this model back to a checkpoint that training starts from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor

from hysparse_megatron.architecture.model import ModelConfig
from hysparse_megatron.architecture.parameters import padded_vocab_size
from hysparse_megatron.checkpoint.assemble import Source, save_weights
from hysparse_megatron.compatibility import compared_settings
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.frozen import freeze, to_tree
from hysparse_megatron.config.schema import Config, Precision
from hysparse_megatron.data.card import TOKENIZER_NAME
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.files import sha256_of
from hysparse_megatron.huggingface import settings, tokenizer_files
from hysparse_megatron.huggingface.folders import write_folder
from hysparse_megatron.huggingface.reading import TensorFolder
from hysparse_megatron.huggingface.weights import KEPT_IN_FP32, TABLES, Fused, model_weights
from hysparse_megatron.rundir import versions

EXPERIMENT = "experiment.yaml"
"""Settings with which a run starts from the weights, to be copied into conf/experiment/."""

Log = Callable[[str], None]
_NO_ARCHITECTURE = ("backend", "layers", "fp8")
"""Settings of a model that say how it is computed."""


def import_folder(source: Path, folder: Path, log: Log) -> None:
    """Make `folder`, which must not exist or be empty, of an exported (and trained) `source`.

    Raises ConfigError for a source that is none or does not fit its own settings, CheckpointError
    for one that is damaged or a folder that cannot be written.
    """
    described = settings.read_json(source)
    found = described.get("model_type")
    if found != settings.MODEL_TYPE:
        raise ConfigError(
            f"{source} is a model of type {found}, not {settings.MODEL_TYPE}; a model of another "
            "architecture is taken over with adopt"
        )
    tensors = TensorFolder(source)
    model = untied(settings.from_json(described), tensors, log)
    if model.vocab_size is None:
        raise ConfigError(f"{settings.CONFIG_JSON}: vocab_size is null; allowed a whole number")
    weights = model_weights(model, model.vocab_size)
    check_names(tensors, {name: shape for w in weights for name, shape in w.shapes.items()})
    sources = {weight.name: _source(weight, tensors) for weight in weights}
    length = described.get("max_position_embeddings")
    if length is not None and (type(length) is not int or length < 1):
        raise ConfigError(
            f"{settings.CONFIG_JSON}: max_position_embeddings {length!r}; allowed a whole number"
        )
    write_start(source, folder, model, sources, length or 2, log)


def check_names(
    tensors: TensorFolder, wanted: Mapping[str, tuple[int, ...]], ignored: Sequence[str] = ()
) -> None:
    """Raise ConfigError unless the folder's tensors are those `wanted`, of their shapes.

    Names that end with one of `ignored` may be there too, and so may a tied output projection.
    """
    problems = [f"no {name}" for name in wanted if name not in tensors.names]
    problems += [
        f"{name} is {list(tensors.shape(name))}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors.names and tensors.shape(name) != shape
    ]
    problems += [
        f"{name} too many"
        for name in sorted(tensors.names - wanted.keys() - {"lm_head.weight"})
        if not name.endswith(tuple(ignored))
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConfigError(
            f"the tensors do not fit {settings.CONFIG_JSON}: {'; '.join(problems[:5])}{more}"
        )


def untied(model: ModelConfig, tensors: TensorFolder, log: Log) -> ModelConfig:
    """`model` with an output projection of its own if the folder has one unlike its embedding.

    As in transformers, which then does not tie them whatever `tie_word_embeddings` says.
    """
    names = ("model.embed_tokens.weight", "lm_head.weight")
    if not model.tie_embeddings or not tensors.names.issuperset(names):
        return model
    if tensors.shape(names[0]) == tensors.shape(names[1]):
        dtype = tensors.widest(names)
        embedding, output = (tensors.read(name).to(dtype) for name in names)
        if torch.equal(embedding, output):
            return model
    log("WARNING: lm_head.weight is not the embedding, so they are not tied")
    return dataclasses.replace(model, tie_embeddings=False)


def _source(weight: Fused, tensors: TensorFolder) -> Source:
    dtype = tensors.widest([name for name, _ in weight.parts])
    if weight.name.endswith(KEPT_IN_FP32):
        dtype = torch.float32

    def read() -> Tensor:
        return weight.join({name: tensors.read(name).to(dtype) for name, _ in weight.parts})

    return padded(weight.name, Source(weight.shape, dtype, read))


def padded(name: str, source: Source) -> Source:
    """Embedding and output projection with rows of zeros up to what training has; others as is."""
    if name not in TABLES:
        return source
    rows = padded_vocab_size(source.shape[0])
    read = functools.partial(_with_rows, source.read, rows)
    return Source((rows, *source.shape[1:]), source.dtype, read)


def _with_rows(read: Callable[[], Tensor], rows: int) -> Tensor:
    tensor = read()
    return torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])])


def write_start(
    source: Path,
    folder: Path,
    model: ModelConfig,
    sources: Mapping[str, Source],
    length: int,
    log: Log,
) -> None:
    """A folder with a checkpoint of `sources`, settings for a run from it, and the tokenizer.

    `source` is the Hugging Face folder with the tokenizer, `length` what it was trained on.
    """
    tokenizer = source / TOKENIZER_NAME
    facts: dict[str, Any] = {"tokens": 0, "made_from": str(source), "versions": versions()}
    if tokenizer.is_file():
        facts["tokenizer"] = {
            "tokenizer_sha256": sha256_of(tokenizer),
            "vocab_size": tokenizer_files.check_vocabulary(tokenizer, model.vocab_size or 0, log),
        }
        if added := tokenizer_files.not_reproduced(tokenizer):
            log(
                f"WARNING: {tokenizer} puts {' and '.join(added)} around a text, which nothing "
                "here does: prompts and documents are read without"
            )
    else:
        log(f"WARNING: {source} has no {TOKENIZER_NAME}: name the run's with data.tokenizer")
    # Weights that are wider than bf16 would be rounded by a run in it.
    types = {s.dtype for name, s in sources.items() if not name.endswith(KEPT_IN_FP32)}
    precision = Precision.bf16 if types == {torch.bfloat16} else Precision.fp32
    config = _config(model, folder, length, precision, tokenizer.is_file())
    facts["model"] = compared_settings(config)["model"]

    def write(target: Path) -> None:
        checkpoint = save_weights(target / "checkpoints", sources, facts)
        log(f"{len(sources)} tensors in {checkpoint.relative_to(target)}")
        if tokenizer.is_file():
            tokenizer_files.copy_tokenizer(tokenizer, target)
        freeze(config, target)
        (target / EXPERIMENT).write_text(_experiment(config), encoding="utf-8")

    write_folder(folder, write)


def _config(
    model: ModelConfig, folder: Path, length: int, precision: Precision, has_tokenizer: bool
) -> Config:
    """Of a run that starts from `folder`, as far as that follows from it."""
    config = compose([])
    return dataclasses.replace(
        config,
        name=folder.name,
        model=model,
        train=dataclasses.replace(config.train, seq_length=length, precision=precision),
        checkpoint=dataclasses.replace(config.checkpoint, load=str(folder)),
        data=dataclasses.replace(
            config.data, tokenizer=str(folder / TOKENIZER_NAME) if has_tokenizer else None
        ),
    )


def _experiment(config: Config) -> str:
    tree = to_tree(config)
    for name in _NO_ARCHITECTURE:
        del tree["model"][name]
    chosen: dict[str, Any] = {
        "model": tree["model"],
        "train": {"precision": tree["train"]["precision"]},
        "data": {"tokenizer": tree["data"]["tokenizer"]},
        "checkpoint": {"load": tree["checkpoint"]["load"]},
    }
    lines = [
        "# @package _global_",
        "# The model of these weights. Copy it to conf/experiment/NAME.yaml and start with",
        "# experiment=NAME, and train.* and data.* of your own.",
    ]
    return "\n".join([*lines, yaml.safe_dump(chosen, sort_keys=False)])
