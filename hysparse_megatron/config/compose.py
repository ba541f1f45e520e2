"""From `conf/` and command-line overrides to one `Config`, by Hydra's compose API.

Only the composing is Hydra's: it makes no output directory, changes no working directory and sets
up no logging. One process composes; the others read what `freeze` wrote.
"""

import contextlib
import copy
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hysparse_megatron.config import schema
from hysparse_megatron.config.describe import (
    allowed_values,
    is_mapping,
    nearest,
    type_of,
    unknown_key,
)
from hysparse_megatron.config.frozen import build, schema_node
from hysparse_megatron.config.own_presets import own_folders, refuse_shadows, search_path
from hysparse_megatron.config.problems import as_error
from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import ConfigError, Problem

SECTIONS: dict[str, type] = {
    "model": schema.ModelConfig,
    "data": schema.DataConfig,
    "parallel": schema.ParallelConfig,
    "optim": schema.OptimConfig,
    "train": schema.TrainConfig,
    "checkpoint": schema.CheckpointConfig,
    "tracking": schema.TrackingConfig,
    "cluster": schema.ClusterConfig,
    "debug": schema.DebugConfig,
}
GROUPS = (*SECTIONS, "experiment")

# Hydra answers a number where a group's option should stand with a plain ValueError.
_TO_QUOTE = ("model.layout", "data.blend")
_COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)


def config_directory() -> Path:
    """`conf/` inside the package where it was installed, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ConfigError(f"no conf/config.yaml inside or beside {package}: the install is broken")


def compose(overrides: Sequence[str]) -> Config:
    """Compose a run from `conf/` and Hydra overrides (`group=option`, `key=value`, `+`, `~`).

    `--config-dir=DIR` among them names a folder of a user's own presets, such as DIR/model/x.yaml;
    `conf/local` of the working directory is one as well.

    Raises one `ConfigError` that lists every override that is wrong by itself: unknown keys and
    groups, wrong types, values outside an enumeration. What only together is wrong is for
    `validate` to find.
    """
    _register_schema()
    folders, overrides = own_folders(overrides)
    refuse_shadows(folders, config_directory(), GROUPS)
    path = search_path(folders, config_directory())
    overrides = [_named(_quoted(_without_plus(override))) for override in overrides]
    with initialize_config_dir(config_dir=str(config_directory()), version_base="1.3"):
        refused = [_hydra_setting(override) or _bare_list(override) for override in overrides]
        problems = [problem for problem in refused if problem]
        try:
            tree = _compose_tree(path, overrides)
        except _COMPOSE_ERRORS as error:
            _compose_defaults(path)
            tried = [(_try(override, path, folders)) for override in overrides]
            problems += [problem for problem in tried if problem]
            if problems:
                raise as_error(problems) from error
            raise ConfigError(f"cannot compose the configuration: {_condense(error)}") from error
    if problems:
        raise as_error(problems)
    return build(tree)


@cache
def _register_schema() -> None:
    store = ConfigStore.instance()
    store.store(name="schema", node=schema_node(Config))
    for group, section in SECTIONS.items():
        store.store(group=group, name="schema", node=schema_node(section))


def group_options(group: str, folders: Sequence[Path] = ()) -> list[str]:
    """The presets of a config group, by the names its override takes, also those in `folders`."""
    roots = (config_directory(), *folders)
    return sorted(path.stem for root in roots for path in (root / group).glob("*.yaml"))


def _compose_tree(path: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """The presets, and values over them as Hydra puts them there."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    words = tuple(override for override in overrides if _names_presets(override))
    presets = _presets((*path, *words)) if path else _shipped(config_directory(), words)
    values = [one for one, word in zip(parsed, overrides, strict=True) if word not in words]
    ConfigLoaderImpl._apply_overrides_to_config(values, presets)
    return cast(dict[str, Any], OmegaConf.to_container(presets, resolve=True))


def _presets(words: Sequence[str]) -> DictConfig:
    composed: DictConfig = hydra_compose("config", overrides=list(words))
    return composed


def _shipped(directory: Path, words: tuple[str, ...]) -> DictConfig:
    """Presets of `directory` alone, without folders of a user's own."""
    return copy.deepcopy(_read_shipped(directory, words))


@cache
def _read_shipped(directory: Path, words: tuple[str, ...]) -> DictConfig:
    """Once: it takes four times as long as all else, and a sweep or a test asks for them again."""
    return _presets(words)


def _names_presets(override: str) -> bool:
    """Or is Hydra's own to refuse; any other one is a value of the run."""
    key, value = _key(override), override.partition("=")[2]
    group = key in GROUPS and not value.startswith("{")
    return group or "/" in key or "@" in key or key.startswith("hydra.")


def _compose_defaults(path: Sequence[str]) -> None:
    """Compose with the search path alone: an override is not blamed for a mistake in a file."""
    try:
        _compose_tree(path, [])
    except _COMPOSE_ERRORS as error:
        where = f"{config_directory()} or your own folders" if path else config_directory()
        message = f"a file under {where} is wrong: {_joined(error)}"
        raise ConfigError(message) from error


def _without_plus(override: str) -> str:
    """A group is in the defaults already: `+group=option` can only mean that option."""
    return override.lstrip("+") if _key(override) in GROUPS else override


def _quoted(override: str) -> str:
    """Quote a layout or a blend: Hydra's grammar does not take their parentheses and semicolons."""
    key, equals, value = override.partition("=")
    if not equals or key.lstrip("+") not in _TO_QUOTE or value[:1] in ("'", '"'):
        return override
    escaped = value.replace("'", "\\'")
    return f"{key}='{escaped}'"


def _named(override: str) -> str:
    """`data.evaluation.code=...` names a new key of a mapping, for which Hydra wants pluses."""
    key, plain = _key(override), override.lstrip("+")
    named = is_mapping(key) or is_mapping(key.rpartition(".")[0])
    return f"++{plain}" if named and not override.startswith("~") else override


def _hydra_setting(override: str) -> Problem | None:
    key = _key(override)
    if key.startswith(("hydra.", "hydra/")):
        return Problem(key, "a setting of Hydra itself", "settings of the run, such as run_dir")
    return None


def _bare_list(override: str) -> Problem | None:
    """A text with commas and no quotes is a list to Hydra, which would write that as a text."""
    key, value = _key(override), override.partition("=")[2]
    if type_of(key) not in (str, str | None):
        return None
    with contextlib.suppress(HydraException):
        (parsed,) = OverridesParser.create().parse_overrides([override])
        if parsed.is_sweep_override():
            allowed = f"one text; quoted twice if it has commas: \"{key}='{value}'\""
            return Problem(key, value, allowed)
    return None


def _try(override: str, path: Sequence[str], folders: Sequence[Path]) -> Problem | None:
    """What is wrong with one override, tried alone on top of the defaults."""
    key, value = _key(override), override.partition("=")[2]
    try:
        _compose_tree(path, [override])
        return None if key in GROUPS or type_of(key) is not None else unknown_key(key)
    except OverrideParseException as error:
        allowed = "key=value, with quotes around a value that holds , ( ) [ ] { } = or quotes"
        return Problem(override, f"an unreadable override ({_condense(error)})", allowed)
    except _COMPOSE_ERRORS as error:
        if key in GROUPS and value in group_options(key, folders):
            told = f"a preset with a mistake in it ({_joined(error)})"
            return Problem(override, told, "a file of settings that exist")
        if key in GROUPS and not value.startswith("{"):
            options = group_options(key, folders)
            return Problem(key, value, f"one of {', '.join(options)}{nearest(value, options)}")
        if (group := key.partition("@")[0]) in GROUPS:
            return Problem(key, "a group with a package", f"{group}={value}, without @")
        if type_of(key) is None:
            return unknown_key(key)
        if override.startswith("+") and not override.startswith("++"):
            return Problem(key, "a + before a key that exists", f"{key}={value}, without the +")
        if override.startswith("~"):
            return Problem(key, "a deletion", f"{allowed_values(key)}: give it a value instead")
        return Problem(key, value, allowed_values(key, value))


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~").strip()


def _joined(error: Exception) -> str:
    """Hydra's message about a file, in one line."""
    told = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in told if not line.startswith(("reference_type", "object_type")))


def _condense(error: Exception) -> str:
    """The first line of Hydra's message, and of its cause, without search paths and links."""
    messages = [str(error), str(error.__cause__ or "")]
    return "; ".join(message.splitlines()[0] for message in messages if message)
