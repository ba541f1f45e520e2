"""`README.md` of an exported folder: what the model is, what it read, how good it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml  # type: ignore[import-untyped]

from hysparse_megatron import __version__
from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.architecture.parameters import count_parameters
from hysparse_megatron.config.schema import VALIDATION, Config
from hysparse_megatron.errors import ConfigError

_NAMES = {
    LayerKind.FULL: "full attention",
    LayerKind.SPARSE: "sparse, reading selection and KV cache of the full layer before",
    LayerKind.WINDOW: "sliding window",
}
_USE = """\
```python
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True, dtype="auto")
prompt = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
```"""


def model_card(
    config: Config,
    manifest: Mapping[str, Any],
    evaluations: Mapping[str, Sequence[dict[str, Any]]],
    *,
    vocab_rows: int,
    num_parameters: int,
    license_id: str | None,
) -> str:
    """The card, in Markdown with the metadata that model hubs read on top.

    Args:
        config: the run's.
        manifest: of the checkpoint.
        evaluations: rows of the run's evaluations by the set that they are on; those after the
            checkpoint are left out.
        vocab_rows: token ids of the exported embedding.
        num_parameters: of all exported tensors.
        license_id: of the weights, as model hubs spell it; None says that it is not stated.

    Raises ConfigError for a license with characters such as line breaks.
    """
    if license_id is not None and not license_id.isprintable():
        raise ConfigError(f"--license: got {license_id!r}; allowed one line of printable text")
    told = yaml.safe_dump({"license": license_id}, allow_unicode=True) if license_id else ""
    return f"""---
{told}library_name: transformers
pipeline_tag: text-generation
tags: [hysparse, sparse-attention]
---

# {config.name}

A language model with HySparse attention ([arXiv 2602.03560](https://arxiv.org/abs/2602.03560)),
exported by hysparse_megatron {__version__} after step {manifest["step"]} of its training.

{_USE}

## Model

{_model(config, vocab_rows, num_parameters)}

## Training data

{_data(config, manifest)}

## Evaluation

{_evaluation(evaluations, manifest["step"])}

## License

{_license(license_id)}
"""


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _model(config: Config, vocab_rows: int, num_parameters: int) -> str:
    model, layout = config.model, parse_layout(config.model.layout)
    kinds = layout.kinds
    counted = count_parameters(dataclasses.replace(model, vocab_size=vocab_rows), kinds)
    active = num_parameters - (counted.total - counted.active)
    selected = f"{model.num_selected_blocks} blocks of {model.block_size} tokens"
    heads = f"{model.num_attention_heads} of query, {model.num_query_groups} of key and value"
    # Without the cuts between pipeline stages, of which an export knows nothing.
    rows = [("layout", f"`{layout.letters}`")]
    rows += [
        (name, f"{kinds.count(kind)} layers") for kind, name in _NAMES.items() if kind in kinds
    ]
    rows += [
        ("parameters", f"{num_parameters:,}, {active:,} of them active for a token"),
        ("hidden size", f"{model.hidden_size:,}"),
        ("heads", heads),
        ("a sparse layer reads", f"{selected}, and a window of {model.window} tokens"),
        ("token ids", f"{vocab_rows:,}"),
        ("trained on sequences of", f"{config.train.seq_length:,} tokens"),
    ]
    return _table(rows)


def _data(config: Config, manifest: Mapping[str, Any]) -> str:
    data = manifest.get("data") or {}
    rows = []
    if "tokens" in manifest:
        rows.append(("trained on", f"{manifest['tokens']:,} tokens"))
    for split in ("train", "validation"):
        if f"{split}_documents" in data:
            documents, tokens = (data[f"{split}_{unit}"] for unit in ("documents", "tokens"))
            rows.append((f"{split} split", f"{documents:,} documents, {tokens:,} tokens"))
    hashes = ("fingerprint", "tokenizer_sha256")
    rows += [(name, f"`{data[name]}`") for name in hashes if name in data]
    if not rows:
        return "The checkpoint does not say what it was trained on."
    rows.append(("documents see one another", "no" if config.data.document_mask else "yes"))
    return _table(rows) + "\n\nWhere the text comes from is for who publishes this model to add."


def _evaluation(evaluations: Mapping[str, Sequence[dict[str, Any]]], step: int) -> str:
    lines = []
    for name, rows in evaluations.items():
        until = [row for row in rows if row["step"] <= step]
        if until:
            last = until[-1]
            tokens = f"{last['eval_tokens']:,}" if "eval_tokens" in last else ""
            text = "held-out part of the training data" if name == VALIDATION else name
            lines.append(f"| {text} | {last['step']} | {last['eval_loss']:.4f} | {tokens} |")
    if not lines:
        return "The run has no evaluation up to this step."
    head = ["| text | after step | loss, nats per token | tokens |", "|---|---|---|---|"]
    return "\n".join([*head, *lines])


def _license(license_id: str | None) -> str:
    code = "The Python files are under the Apache License 2.0 (`LICENSE.code`)."
    if license_id is None:
        return f"{code} None of the weights is stated: `hysparse convert export --license` does."
    return f"{code} The weights: {license_id}."
