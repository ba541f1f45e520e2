"""The frozen file: what is written is what is read, whole or not at all."""

from dataclasses import replace
from pathlib import Path

import pytest

from hysparse_megatron.architecture.model import ModelConfig
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.frozen import (
    build,
    config_hash,
    freeze,
    from_yaml,
    load_frozen,
    to_yaml,
)
from hysparse_megatron.config.schema import Config, TrainConfig
from hysparse_megatron.errors import ConfigError


@pytest.fixture(scope="module")
def config() -> Config:
    return compose(["experiment=quickstart", "tracking.entity=null", "data.path='a: b #c'"])


def test_round_trip(config: Config, tmp_path: Path) -> None:
    digest = freeze(config, tmp_path / "new" / "run")
    path = tmp_path / "new" / "run" / "config.yaml"
    assert load_frozen(path) == config
    assert digest == config_hash(config) == config_hash(load_frozen(path))
    assert freeze(config, path.parent) == digest
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]
    assert "${" not in path.read_text()


def test_the_hash_follows_every_setting(config: Config) -> None:
    other = replace(config, optim=replace(config.optim, beta2=0.951))
    assert config_hash(config) != config_hash(other)
    assert config_hash(config) == config_hash(from_yaml(to_yaml(config)))


def test_a_config_made_in_python_round_trips() -> None:
    model = ModelConfig(
        layout="F 3*S F",
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=16,
    )
    train = TrainConfig(steps=2, global_batch_size=2, micro_batch_size=1, seq_length=64)
    config = Config(model=model, train=train)
    assert from_yaml(to_yaml(config)) == config
    assert config.run_path == Path("runs/run")


def test_mistakes_in_a_file_are_all_listed(config: Config, tmp_path: Path) -> None:
    text = to_yaml(config).replace("hidden_size: 128", "hidden_sice: 128")
    text = text.replace("precision: fp32", "precision: fp8")
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml") as caught:
        load_frozen(path)
    keys = [problem.key for problem in caught.value.problems]
    assert keys == ["model.hidden_sice", "train.precision", "model.hidden_size"]
    assert "did you mean hidden_size?" in str(caught.value)


def test_required_settings_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        build({"model": {"layout": "F"}})
    keys = {problem.key for problem in caught.value.problems}
    assert {"model.hidden_size", "train.steps"} <= keys
    assert "model.layout" not in keys


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "name: ${nowhere}"])
def test_texts_that_are_no_configuration(text: str) -> None:
    with pytest.raises(ConfigError):
        from_yaml(text)


def test_a_missing_file_and_an_impossible_directory(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.yaml"):
        load_frozen(tmp_path / "nowhere.yaml")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        freeze(config, tmp_path / "file" / "run")
