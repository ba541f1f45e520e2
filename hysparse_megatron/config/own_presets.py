"""Folders of a user's own presets, beside the shipped ones: `--config-dir` and `conf/local`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from hysparse_megatron.errors import ConfigError

OPTION = "--config-dir"
LOCAL = Path("conf", "local")
"""In the working directory: presets, and settings of all runs in `local.yaml`."""


def own_folders(words: Iterable[str]) -> tuple[list[Path], list[str]]:
    """The folders that a command line names, with `conf/local` where there is one, and the rest.

    Raises ConfigError for a folder that is not there.
    """
    folders, rest = [], []
    for word in words:
        if not word.startswith(f"{OPTION}="):
            rest.append(word)
            continue
        folder = Path(word.partition("=")[2])
        if not folder.is_dir():
            raise ConfigError(f"{OPTION}: got {folder}; allowed a folder, such as one with model/")
        folders.append(folder)
    local = [LOCAL] if LOCAL.is_dir() else []
    return [*folders, *local], rest


def refuse_shadows(folders: Sequence[Path], shipped: Path, groups: Iterable[str]) -> None:
    """Raises ConfigError if a preset of `folders` has the name of another: one would be lost."""
    for group in groups:
        seen = {path.stem: path for path in (shipped / group).glob("*.yaml")}
        for path in (path for folder in folders for path in (folder / group).glob("*.yaml")):
            other = seen.setdefault(path.stem, path)
            if not other.samefile(path):
                raise ConfigError(f"{path}: {other} has that name already; give the file another")


def search_path(folders: Sequence[Path], shipped: Path) -> list[str]:
    """The override that lets Hydra look into `folders`; none for none."""
    found = [folder.absolute() for folder in folders]
    if (LOCAL / "local.yaml").is_file() and not LOCAL.parent.samefile(shipped):
        found.append(LOCAL.parent.absolute())  # conf/config.yaml reads local/local.yaml
    quoted = [f"file://{folder}".replace("\\", "\\\\").replace("'", "\\'") for folder in found]
    return (
        ["hydra.searchpath=[{}]".format(",".join(f"'{text}'" for text in quoted))] if found else []
    )
