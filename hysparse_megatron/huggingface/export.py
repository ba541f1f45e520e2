"""From a checkpoint to a folder that transformers loads: one shard in memory at a time."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hysparse_megatron.checkpoint import store, tensors
from hysparse_megatron.compatibility import require_same_model
from hysparse_megatron.config.schema import Config
from hysparse_megatron.data.run_tokenizer import load_file
from hysparse_megatron.data.tokenizer import Encoder
from hysparse_megatron.errors import CheckpointError
from hysparse_megatron.huggingface import settings, tokenizer_files
from hysparse_megatron.huggingface.folders import write_folder
from hysparse_megatron.huggingface.model_card import model_card
from hysparse_megatron.huggingface.reading import INDEX, SINGLE
from hysparse_megatron.huggingface.weights import (
    EMBEDDING,
    KEPT_IN_FP32,
    TABLES,
    Fused,
    model_weights,
)
from hysparse_megatron.source import license_text

CODE = tuple(f"{part}_hysparse.py" for part in ("configuration", "attention", "layers", "modeling"))
"""Files of this package that an exported folder gets a copy of."""
LICENSE_OF_CODE = "LICENSE.code"
"""Their license, in that folder. Nothing is said about the weights: their owner decides."""

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be exported."""

    checkpoint: Path
    config: Config
    """The run's."""
    tokenizer: Path | None
    """A `tokenizer.json`; None looks where the run has it."""
    dtype: torch.dtype | None
    """Of the weights; None keeps the checkpoint's."""
    shard_bytes: int
    evaluations: Mapping[str, Sequence[dict[str, Any]]]
    """Rows of the run's evaluations by the set that they are on, for the model card."""
    license_id: str | None = None
    """Of the weights, for the model card; None leaves it open."""


def export(request: Request, folder: Path, log: Log) -> None:
    """Write `folder`, which must not exist or be empty, whole or not at all.

    Raises CheckpointError for a checkpoint that cannot be read or fitted to the run's settings, or
    a folder that cannot be written, and ConfigError for everything else.
    """
    require_same_model(request.config, request.checkpoint)
    index = tensors.read_index(request.checkpoint)
    index = {name: e for name, e in index.items() if not name.startswith(tensors.OPTIMIZER)}
    rows = _fitting_rows(request, index)
    manifest = store.read_manifest(request.checkpoint)
    identity = store.tokenizer_facts(manifest)
    tokenizer = request.tokenizer
    if tokenizer is None:
        tokenizer = tokenizer_files.find_tokenizer(request.config.data, identity)
    fitting = request.config.model.vocab_size or rows
    ids = tokenizer_files.check_vocabulary(tokenizer, fitting, log, identity.get("vocab_size"))
    # Without the rows that fill the embedding up to a round number, which no loss has seen.
    rows = request.config.model.vocab_size or ids
    weights = model_weights(request.config.model, rows)
    types = {weight.name: _dtype(request, weight, index) for weight in weights}
    described = _description(request, rows, types)
    card = model_card(
        request.config,
        manifest,
        request.evaluations,
        vocab_rows=rows,
        num_parameters=sum(weight.numel for weight in weights),
        license_id=request.license_id,
    )

    trained = load_file(tokenizer, manifest.get("data"))
    tokenizer_files.warn_of_other_begin(tokenizer, trained, manifest.get("data") or {}, log)

    def write(target: Path) -> None:
        _write_weights(request, weights, types, index, target, log)
        tokenizer_files.write_object(target / settings.CONFIG_JSON, described)
        length = request.config.train.seq_length
        tokenizer_files.write_tokenizer(tokenizer, target, trained, length)
        generation = _generation(trained, tokenizer_files.ids_without_token(tokenizer, rows))
        tokenizer_files.write_object(target / "generation_config.json", generation)
        for name in CODE:
            shutil.copyfile(Path(__file__).with_name(name), target / name)
        (target / "README.md").write_text(card, encoding="utf-8")
        (target / LICENSE_OF_CODE).write_text(license_text(), encoding="utf-8")

    write_folder(folder, write)


def _generation(trained: Encoder, no_tokens: list[int]) -> dict[str, Any]:
    """`generation_config.json`; `no_tokens` are ids that are never to be generated."""
    end, begin = trained.end_of_document, trained.begin_of_document
    # Where documents begin with no token, one begins, for `generate` without a prompt, with the end
    # of the one before.
    found: dict[str, Any] = {
        "bos_token_id": end if begin is None else begin,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    return found | ({"suppress_tokens": no_tokens} if no_tokens else {})


def _fitting_rows(request: Request, index: dict[str, dict[str, Any]]) -> int:
    """Rows of the embedding of a checkpoint that has all weights of the run's model, no others."""
    if EMBEDDING not in index:
        raise CheckpointError(f"{request.checkpoint} holds no language model: no {EMBEDDING}")
    model, rows = request.config.model, index[EMBEDDING]["shape"][0]
    weights = model_weights(model, rows)
    wanted = {weight.name: list(weight.shape) for weight in weights}
    problems = [f"no {name}" for name in wanted if name not in index]
    problems += [f"{name} too many" for name in index if name not in wanted]
    problems += [
        f"{name} is {index[name]['shape']}, not {shape}"
        for name, shape in wanted.items()
        if name in index and index[name]["shape"] != shape
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{request.checkpoint} does not fit the model of the run's settings: "
            f"{'; '.join(problems[:5])}{more}"
        )
    return rows


def _dtype(request: Request, weight: Fused, index: dict[str, dict[str, Any]]) -> torch.dtype:
    """In which a weight is written."""
    if weight.name.endswith(KEPT_IN_FP32):
        return torch.float32
    return request.dtype or getattr(torch, index[weight.name]["dtype"])


def _write_weights(
    request: Request,
    weights: Sequence[Fused],
    types: Mapping[str, torch.dtype],
    index: dict[str, dict[str, Any]],
    folder: Path,
    log: Log,
) -> None:
    sizes = [weight.numel * types[weight.name].itemsize for weight in weights]
    shards = _shards(weights, sizes, request.shard_bytes)
    place: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        held: dict[str, torch.Tensor] = {}
        for weight in shard:
            whole = tensors.read_tensor(request.checkpoint, index[weight.name])
            if weight.name in TABLES:
                whole = whole[: weight.shape[0]]
            whole = whole.to(types[weight.name])
            if not tensors.is_finite(whole):
                raise CheckpointError(f"{request.checkpoint}: {weight.name} holds NaN or infinity")
            held |= weight.split(whole)
        save_file(held, folder / name, metadata={"format": "pt"})
        place |= dict.fromkeys(held, name)
        log(f"{name}: {len(held)} tensors, {sum(t.nbytes for t in held.values()):,} bytes")
    if len(shards) > 1:
        content = {"metadata": {"total_size": sum(sizes)}, "weight_map": place}
        tokenizer_files.write_object(folder / INDEX, content)


def _shards(weights: Sequence[Fused], sizes: Sequence[int], limit: int) -> list[list[Fused]]:
    """Weights in order, as many in a shard as `limit` bytes hold, and at least one."""
    shards: list[list[Fused]] = []
    left = -1
    for weight, size in zip(weights, sizes, strict=True):
        if size > left:
            shards.append([])
            left = limit
        shards[-1].append(weight)
        left -= size
    return shards


def _description(request: Request, rows: int, types: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """`config.json`. Raises ConfigError for a model that has no place in an exported folder."""
    # transformers converts all weights to the one that is named: to a narrower it would round.
    rest = [dtype for name, dtype in types.items() if not name.endswith(KEPT_IN_FP32)]
    dtype = str(functools.reduce(torch.promote_types, rest)).removeprefix("torch.")
    length = request.config.train.seq_length
    return settings.to_json(request.config.model, rows, length, dtype)
