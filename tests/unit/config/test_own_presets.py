"""A user's own presets: `--config-dir`, and `conf/local` of the working directory."""

from pathlib import Path

import pytest

from hysparse_megatron.config.cli import load, parse_arguments
from hysparse_megatron.config.compose import compose
from hysparse_megatron.errors import ConfigError

MODEL = "defaults:\n  - schema\n  - base/tiny@_here_\n  - _self_\nlayout: F S F\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_model_of_ones_own() -> None:
    write(Path("my 'presets'/model/mine.yaml"), MODEL)
    write(
        Path("my 'presets'/experiment/second.yaml"),
        "# @package _global_\ndefaults:\n  - override /model: mine\nname: second\n",
    )
    config = compose(["--config-dir=my 'presets'", "experiment=second", "model.hidden_size=64"])
    assert (config.name, config.model.layout, config.model.hidden_size) == ("second", "F S F", 64)
    arguments = parse_arguments(["--config-dir", "my 'presets'", "model=mine"])
    assert parse_arguments(arguments.words) == arguments
    assert load(arguments).model.layout == "F S F"


def test_the_working_directory_has_some_without_being_asked() -> None:
    write(Path("conf/local/model/mine.yaml"), MODEL)
    write(Path("conf/local/local.yaml"), "name: local\n")
    config = compose(["model=mine"])
    assert (config.name, config.model.layout) == ("local", "F S F")


def test_mistakes_are_told() -> None:
    with pytest.raises(ConfigError, match="--config-dir: got nowhere; allowed a folder"):
        compose(["--config-dir=nowhere"])
    write(Path("own/model/mine.yaml"), MODEL)
    with pytest.raises(ConfigError, match=r"got min; .*\bmine\b.* \(did you mean mine\?\)"):
        compose(["--config-dir=own", "model=min"])
    with pytest.raises(ConfigError, match="--config takes its file as it is: leave out --config-d"):
        parse_arguments(["--config", "x.yaml", "--config-dir", "own"])
    write(Path("own/model/mine.yaml"), MODEL.replace("layout", "layuot"))
    with pytest.raises(ConfigError, match="layuot"):
        compose(["--config-dir=own", "model=mine"])
    write(Path("own/model/tiny_full.yaml"), MODEL)
    with pytest.raises(ConfigError, match=r"tiny_full\.yaml has that name already"):
        compose(["--config-dir=own"])
