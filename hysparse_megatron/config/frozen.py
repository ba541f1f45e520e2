"""From a plain tree or a YAML text to a checked `Config`, and back to a file all ranks read."""

import copy
import functools
import hashlib
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hysparse_megatron.config.describe import allowed_values, is_mapping, type_of, unknown_key
from hysparse_megatron.config.problems import as_error
from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import ConfigError, Problem
from hysparse_megatron.files import write_whole

CONFIG_FILE = "config.yaml"


def schema_node(section: type) -> DictConfig:
    """A dataclass of the schema as an OmegaConf node that values can be merged into."""
    return copy.deepcopy(_schema_node(section))


@functools.cache
def _schema_node(section: type) -> DictConfig:
    """Made once, as that takes ten times as long as a copy.

    OmegaConf makes nodes of frozen dataclasses read-only; the freezing is meant for the
    finished object, so the flag is taken off here.
    """
    node: DictConfig = OmegaConf.structured(section)
    node._set_flag("readonly", None)
    for key in list(node):
        child = node._get_node(key)
        if isinstance(child, DictConfig) and is_dataclass(child._metadata.ref_type):
            node[key] = schema_node(cast(type, child._metadata.ref_type))
    return node


def build(tree: dict[str, Any]) -> Config:
    """Fill the schema from nested plain values. Raises one `ConfigError` listing all mistakes."""
    node = schema_node(Config)
    problems: list[Problem] = []
    defaults = _defaults()
    for key, value in _leaves(tree):
        if key in defaults and repr(value) == repr(defaults[key]):
            continue  # to put it there takes a hundred times as long
        if type_of(key) is None:
            problems.append(unknown_key(key))
            continue
        try:
            OmegaConf.update(node, key, value, force_add=is_mapping(key.rpartition(".")[0]))
        except OmegaConfBaseException:
            problems.append(Problem(key, repr(value), allowed_values(key)))
    reported = {problem.key for problem in problems}
    for key in sorted(OmegaConf.missing_keys(node) - reported):
        problems.append(Problem(key, "nothing", f"{allowed_values(key)} (it must be set)"))
    if problems:
        raise as_error(problems)
    return cast(Config, OmegaConf.to_object(node))


@functools.cache
def _defaults() -> dict[str, Any]:
    """Dotted keys and plain values of what need not be given."""
    tree = OmegaConf.to_container(_schema_node(Config), enum_to_str=True)
    leaves = _leaves(cast(dict[str, Any], tree))
    return {key: value for key, value in leaves if value != MISSING}


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted key and value of everything in `tree` that is not itself a filled section."""
    leaves: list[tuple[str, Any]] = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            leaves += _leaves(value, f"{key}.")
        elif value != {}:
            leaves.append((key, value))
    return leaves


def to_tree(config: Config) -> dict[str, Any]:
    """The whole configuration as nested plain values, in the order of the schema."""
    return cast(dict[str, Any], _plain(config))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.name if isinstance(value, Enum) else value


def to_yaml(config: Config) -> str:
    """The same as YAML, nothing left to resolve."""
    return OmegaConf.to_yaml(OmegaConf.create(to_tree(config)))


def from_yaml(text: str) -> Config:
    """The inverse of `to_yaml`; unknown keys, wrong types and gaps are a `ConfigError`."""
    try:
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"this is not a readable configuration: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError("this is not a configuration: the top level must be a mapping")
    return build(cast(dict[str, Any], tree))


def config_hash(config: Config) -> str:
    """SHA-256 of the YAML text; equal on all ranks if and only if their settings are."""
    return _hash_of(to_yaml(config))


def _hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def freeze(config: Config, run_dir: str | Path) -> str:
    """Write RUN_DIR/config.yaml, whole or not at all, and return the configuration's hash."""
    target, text = Path(run_dir) / CONFIG_FILE, to_yaml(config)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, text, durable=True)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror or error}") from error
    return _hash_of(text)


def load_frozen(path: str | Path) -> Config:
    """Read a file written by `freeze`, or any complete configuration in YAML."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    try:
        return from_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", error.problems) from error
