"""What a key of the schema may hold, in words, for error messages."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import Problem, did_you_mean

ALIASES = {
    "lr max_lr peak_lr": ("optim.learning_rate",),
    "min_lr": ("optim.min_learning_rate",),
    "lr_scheduler lr_schedule": ("optim.schedule",),
    "optimizer": ("optim.name",),
    "grad_clip max_grad_norm": ("optim.clip_grad",),
    "warmup warmup_iters lr_warmup_steps": ("optim.warmup_steps",),
    "batch_size batch gbs": ("train.global_batch_size", "train.micro_batch_size"),
    "mbs": ("train.micro_batch_size",),
    "seq_len max_seq_len max_length context_length": ("train.seq_length",),
    "iters train_iters max_iters max_steps num_steps epochs num_epochs": ("train.steps",),
    "dtype bf16 fp16 fp32": ("train.precision",),
    "eval_every eval_steps": ("train.eval_interval",),
    "save_interval save_every save_steps": ("checkpoint.interval",),
    "output output_dir out_dir save_dir": ("run_dir",),
    "dataset dataset_path": ("data.path",),
    "wandb use_wandb": ("tracking.mode",),
    "num_layers n_layers n_layer depth": ("model.layout",),
    "d_model n_embd dim": ("model.hidden_size",),
    "num_heads n_heads n_head": ("model.num_attention_heads",),
    "num_kv_heads n_kv_heads num_key_value_heads": ("model.num_query_groups",),
    "rope_theta": ("model.rotary_base",),
    "tensor_parallel_size tensor_model_parallel_size": ("parallel.tp",),
    "pipeline_parallel_size pipeline_model_parallel_size": ("parallel.pp",),
    "context_parallel_size": ("parallel.cp",),
    "expert_parallel_size expert_model_parallel_size": ("parallel.ep",),
}
"""What other projects call settings, and what they are called here."""

_MOST_NAMED = 3
_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


_hints_of = cache(get_type_hints)


def type_of(key: str) -> Any:
    """The annotated type of a dotted key, or None if the schema has no such key."""
    annotation: Any = Config
    for part in key.split("."):
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        elif isinstance(annotation, type) and is_dataclass(annotation):
            annotation = _hints_of(annotation).get(part)
        else:
            return None
    return annotation


def is_mapping(key: str) -> bool:
    """Whether the setting holds values under names that the user chooses."""
    return get_origin(type_of(key)) is dict


def allowed_values(key: str, got: str = "") -> str:
    """What the known `key` accepts: the members of an enumeration, with the nearest, or a type."""
    kind = type_of(key)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _describe(kind) + nearest(got, [member.name for member in kind])
    return _describe(kind)


def nearest(word: str, known: Sequence[str]) -> str:
    """` (did you mean x?)` for the one of `known` that is spelled like `word`, or nothing."""
    return did_you_mean(get_close_matches(word, known, n=1))


def unknown_key(key: str) -> Problem:
    """The problem of a key that the schema does not have, with the keys that were possible."""
    section, _, last = key.rpartition(".")
    owner = type_of(section) if section else Config
    while owner is None:
        section, _, last = section.rpartition(".")
        owner = type_of(section) if section else Config
    if not is_dataclass(owner):
        return Problem(key, "an unknown key", f"{section} is {_describe(owner)}, not a section")
    names = [item.name for item in fields(owner)]
    meant = _by_name(key) or get_close_matches(last, names, n=1) or keys_like(key)
    return Problem(key, "an unknown key", f"one of {', '.join(names)}{did_you_mean(meant)}")


def keys_like(key: str) -> list[str]:
    """Settings that somebody may mean who writes `key`, the likeliest first; full keys."""
    if named := _by_name(key):
        return named[:_MOST_NAMED]
    last = _last(key)
    words = set(last.split("_"))
    alike = [known for known in all_keys() if _is_part(words, set(_last(known).split("_")))]
    alike.sort(key=lambda known: len(words ^ set(_last(known).split("_"))))
    names = sorted({_last(known) for known in all_keys()})
    close = get_close_matches(last, names, n=_MOST_NAMED, cutoff=0.75)
    spelled = [known for name in close for known in all_keys() if _last(known) == name]
    return list(dict.fromkeys([*alike, *spelled]))[:_MOST_NAMED]


def _by_name(key: str) -> list[str]:
    """Settings called like this elsewhere, or in another section."""
    known, last = all_keys(), _last(key)
    moved = [one for one in known if one.endswith(f".{key}") or _letters(one) == _letters(key)]
    alias = [one for names, meant in ALIASES.items() if last in names.split() for one in meant]
    return moved or alias or [one for one in known if _last(one) == last]


@cache
def all_keys() -> tuple[str, ...]:
    """The full key of every setting."""

    def below(owner: Any, prefix: str) -> Iterator[str]:
        hints = get_type_hints(owner)
        for item in fields(owner):
            if is_dataclass(hints[item.name]):
                yield from below(hints[item.name], f"{prefix}{item.name}.")
            else:
                yield f"{prefix}{item.name}"

    return tuple(below(Config, ""))


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _letters(key: str) -> str:
    return re.sub(r"[._-]", "", key)


def _is_part(words: set[str], others: set[str]) -> bool:
    return words <= others or others <= words


def _describe(annotation: Any) -> str:
    if isinstance(annotation, UnionType):
        parts = [_describe(part) for part in get_args(annotation) if part is not NoneType]
        return " or ".join([*parts, "null"])
    if annotation == dict[str, str]:
        return "names with texts, {name: text}"
    if annotation == list[str]:
        return "a list of texts, [a,b]"
    if annotation == list[int]:
        return "a list of integers, [1,2]"
    if get_origin(annotation) is list:
        return f"a list, [a,b], of {', '.join(member.name for member in get_args(annotation)[0])}"
    if is_dataclass(annotation):
        return f"a section with {', '.join(item.name for item in fields(annotation))}"
    if issubclass(annotation, Enum):
        return f"one of {', '.join(member.name for member in annotation)}"
    return _TYPE_NAMES[annotation]
