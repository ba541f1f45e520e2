"""Checks of the configuration against the file system."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hysparse_megatron.config.blend import parse_blend
from hysparse_megatron.config.cluster import Scheduler
from hysparse_megatron.config.schema import Config
from hysparse_megatron.config.shell_words import has_control_characters
from hysparse_megatron.errors import Problem


def run_directory(config: Config) -> Iterator[Problem]:
    """The run directory must be one, or must be possible to create."""
    path = str(config.run_path.absolute())
    if has_control_characters(path):
        yield Problem("run_dir", repr(path), "a path of one line, without control characters")
        return
    if config.cluster.scheduler is Scheduler.slurm and "\\" in path:
        yield Problem("run_dir", path, "a path without a backslash, which sbatch takes for itself")
    obstacle = _obstacle(config.run_path)
    if obstacle:
        got = f"{config.run_path} ({obstacle})"
        yield Problem("run_dir", got, "a directory that this user can create and write")
    # What a run writes there would be text to the next start, and the folder another corpus.
    real = os.path.realpath(config.run_path)
    named = {f"data.evaluation.{name}": place for name, place in config.data.evaluation.items()}
    for key, place in {"data.path": config.data.path, **named}.items():
        if place and os.path.isdir(place) and Path(real).is_relative_to(os.path.realpath(place)):
            yield Problem("run_dir", str(config.run_path), f"a directory outside of {key}={place}")


def inputs(config: Config) -> Iterator[Problem]:
    """What the run is told to read must be there."""
    path, tokenizer, load = config.data.path, config.data.tokenizer, config.checkpoint.load
    if path is not None and not os.path.exists(path):
        allowed = "a file or directory that exists, or null"
        if os.path.exists(f"{path}.idx"):  # the common stem of Megatron's files
            allowed = (
                "text, or a folder that hysparse prepare-data made: its card says the tokenizer"
            )
        yield Problem("data.path", path, allowed)
    for folder in _blended(config.data.blend):
        if not os.path.isdir(folder):
            yield Problem("data.blend", folder, "folders that hysparse prepare-data made")
    for name, held_out in config.data.evaluation.items():
        if not os.path.exists(held_out):
            yield Problem(f"data.evaluation.{name}", held_out, "a file or directory that exists")
    if tokenizer is not None and not os.path.exists(tokenizer):
        yield Problem("data.tokenizer", tokenizer, "a file or directory that exists, or null")
    if load is not None and not os.path.isdir(load):
        yield Problem("checkpoint.load", load, "a step or run directory that exists, or null")


def _blended(blend: str | None) -> list[str]:
    """Its folders; none of one that cannot be read, of which its own rule complains."""
    with contextlib.suppress(ValueError):
        return [path for _, path in parse_blend(blend or "")]
    return []


def _obstacle(directory: Path) -> str | None:
    """Why nothing can be written below `directory`, tried by writing: root ignores modes."""
    existing = directory.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return f"{existing} is not a directory"
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".writable-"):
            return None
    except OSError as error:
        return f"{existing}: {error.strerror or error}"
