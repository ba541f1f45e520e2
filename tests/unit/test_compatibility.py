"""Starts over a checkpoint of another model: refused, with all differences, and nothing changed."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from hysparse_megatron.architecture.parameters import padded_vocab_size
from hysparse_megatron.checkpoint.assemble import Source, save_weights
from hysparse_megatron.compatibility import compared_settings, refuse_mismatch
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.frozen import build, config_hash, freeze, to_yaml
from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import CheckpointError, ConfigError
from hysparse_megatron.huggingface.weights import model_weights
from hysparse_megatron.rundir import RunDirectory, prepare_run
from tests.checkpoints import write_step
from tests.run.run_commands import contents

SMALL = ["model.layout=F S W F", "model.vocab_size=300"]
Start = Callable[[Config], object]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Config]:
    """The configuration of a start in the same directory."""
    run_dir = tmp_path / "run"
    return lambda *overrides: build(with_overrides([f"run_dir={run_dir}", *overrides]))


@functools.cache
def composed() -> str:
    return to_yaml(compose(SMALL))


def with_overrides(overrides: Sequence[str]) -> Any:
    """To compose all of them anew would take most of the time of these tests."""
    tree = OmegaConf.merge(OmegaConf.create(composed()), OmegaConf.from_dotlist([*overrides]))
    return OmegaConf.to_container(tree)


def save(config: Config, step: int = 4) -> Path:
    facts = {"data": {"vocab_size": 300}, **compared_settings(config)}
    return write_step(config.run_path / "checkpoints", step, facts)


def save_without_settings(config: Config) -> Path:
    """As versions did that wrote no settings into manifests."""
    weights = model_weights(config.model, padded_vocab_size(300))
    shapes = {weight.name: weight.shape for weight in weights}
    shapes["optimizer.state.exp_avg.decoder.final_norm.weight"] = (1,)
    sources = {
        name: Source(shape, torch.int8, functools.partial(torch.zeros, shape, dtype=torch.int8))
        for name, shape in shapes.items()
    }
    freeze(config, config.run_path)
    facts = {"data": {"vocab_size": 300}, "config_hash": config_hash(config)}
    return save_weights(config.run_path / "checkpoints", sources, facts)


def told(config: Config) -> dict[str, tuple[str, str]]:
    """By key what the checkpoint has and what was asked for."""
    with pytest.raises(ConfigError) as caught:
        refuse_mismatch(config)
    assert caught.value.exit_code == 2
    for problem in caught.value.problems[:20]:
        line = f"{problem.key}: the checkpoint has {problem.allowed}, asked for {problem.got}"
        assert line in str(caught.value)
    return {problem.key: (problem.allowed, problem.got) for problem in caught.value.problems}


OTHER_MODELS = {
    "model.hidden_size=64": ("model.hidden_size", "128", "64"),
    "model.layout=F W S F": ("model.layout", "FSWF", "FWSF"),
    "model.layout=F S W": ("model.layout", "FSWF", "FSW"),
    "model.num_attention_heads=8": ("model.num_attention_heads", "4", "8"),
    "model.value_head_dim=16": ("model.value_head_dim", "32", "16"),
    "model.vocab_size=600": ("model.vocab_size", "300", "600"),
    "model.tie_embeddings=false": ("model.tie_embeddings", "True", "False"),
    "model.qk_norm=true": ("model.qk_norm", "False", "True"),
    "model.gate=channel": ("model.gate", "head", "channel"),
    "model.full_gate=head": ("model.full_gate", "none", "head"),
    "model.sink=none": ("model.sink", "branch", "none"),
    "model.rotary_base=5e5": ("model.rotary_base", "10000.0", "500000.0"),
    "model.window=32": ("model.window", "64", "32"),
    "model.rope_scaling.type=yarn": ("model.rope_scaling.type", "none", "yarn"),
    "model.moe.num_experts=4": ("model.moe.num_experts", "0", "4"),
    "optim.name=muon": ("optim.name", "adamw", "muon"),
}


@pytest.mark.parametrize("override", OTHER_MODELS)
def test_a_start_over_another_model_is_told_what_differs(
    override: str, make: Callable[..., Config]
) -> None:
    save(make())
    key, has, asked = OTHER_MODELS[override]
    assert told(make(override)) == {key: (has, asked)}


def test_all_differences_at_once(make: Callable[..., Config]) -> None:
    moe = ["model.moe.num_experts=4", "model.moe.num_active_experts=2"]
    save(make(*moe, "model.moe.balancing=bias", "model.moe.router_score=sigmoid"))
    found = told(make(*moe, "model.moe.expert_ffn_hidden_size=8", "model.hidden_size=64"))
    assert found.keys() == {
        "model.hidden_size",
        "model.moe.balancing",
        "model.moe.router_score",
        "model.moe.expert_ffn_hidden_size",
    }


LEGAL = [
    "model.layout=F S | 1*W F",
    "model.value_head_dim=32",
    "model.vocab_size=null",
    "model.vocab_size=384",
    "model.backend=reference",
    "model.layers=local",
    "model.hidden_dropout=0.1",
    "model.moe.num_active_experts=2",
    "train.precision=bf16",
    "train.global_batch_size=16",
    "train.steps=7",
    "optim.learning_rate=1e-4",
    "optim.muon.momentum=0.9",
    "parallel.tp=2",
    "data.path=elsewhere",
]


@pytest.mark.parametrize("written", [save, save_without_settings])
def test_what_may_change_when_a_run_goes_on(
    written: Callable[[Config], Path], make: Callable[..., Config]
) -> None:
    written(make())
    refuse_mismatch(make(*LEGAL))


@pytest.mark.parametrize("start", [RunDirectory, prepare_run])
def test_a_refused_start_changes_nothing(start: Start, make: Callable[..., Config]) -> None:
    good = make()
    RunDirectory(good).close()
    save(good)
    before = contents(good.run_path)
    with pytest.raises(ConfigError, match="the checkpoint has"):
        start(make("model.hidden_size=64"))
    with pytest.raises(ConfigError, match="would write over"):
        start(make("checkpoint.resume=false"))
    assert contents(good.run_path) == before


def test_the_newest_whole_checkpoint_decides(make: Callable[..., Config]) -> None:
    save(make())
    damaged = save(make("model.hidden_size=64"), step=8)
    (damaged / "__0_0.distcp").unlink()
    refuse_mismatch(make())
    assert told(make("model.hidden_size=64")).keys() == {"model.hidden_size"}


def test_weights_alone_may_serve_another_stage_and_no_other_model(
    make: Callable[..., Config], tmp_path: Path
) -> None:
    source = save(make())
    for named in (source, source.parents[1]):
        fresh = [f"run_dir={tmp_path / 'fresh'}", f"checkpoint.load={named}"]
        refuse_mismatch(make(*fresh, "model.rotary_base=640000", "model.window=32"))
        refuse_mismatch(make(*fresh, "optim.name=muon", "model.vocab_size=384"))
        refuse_mismatch(
            make(*fresh, "model.rope_scaling.type=linear", "model.rope_scaling.factor=2")
        )
        assert told(make(*fresh, "model.layout=F W S F")) == {"model.layout": ("FSWF", "FWSF")}
        with pytest.raises(ConfigError, match=r"model\.hidden_size: the checkpoint has 128"):
            RunDirectory(make(*fresh, "model.hidden_size=64"))
    assert not (tmp_path / "fresh").exists()


def test_weights_to_start_from_are_no_run_to_continue(make: Callable[..., Config]) -> None:
    config = make()
    write_step(config.run_path / "checkpoints", 0, {"tokens": 0, **compared_settings(config)})
    before = contents(config.run_path)
    with pytest.raises(CheckpointError, match="holds weights alone and cannot be continued"):
        RunDirectory(config)
    assert contents(config.run_path) == before


def test_a_checkpoint_without_settings_is_known_by_its_configuration(
    make: Callable[..., Config],
) -> None:
    save_without_settings(make())
    found = told(make("model.hidden_size=64", "model.window=32", "optim.name=muon"))
    assert found == {
        "model.hidden_size": ("128", "64"),
        "model.window": ("64", "32"),
        "optim.name": ("adamw", "muon"),
    }


def test_a_checkpoint_without_settings_is_known_by_its_tensors(make: Callable[..., Config]) -> None:
    """The configuration beside it was written over by a start that failed."""
    save_without_settings(make())
    freeze(make("model.hidden_size=64"), make().run_path)
    refuse_mismatch(make())
    found = told(make("model.hidden_size=64"))
    assert found["decoder.final_norm.weight"] == ("[128]", "[64]")
    assert told(make("optim.name=muon")) == {"optim.name": ("adamw", "muon")}
    freeze(make("train.steps=7"), make().run_path)
    assert told(make("model.window=32")) == {"model.window": ("64", "32")}


def test_a_setting_that_is_newer_than_the_checkpoint(make: Callable[..., Config]) -> None:
    settings = compared_settings(make())
    del settings["model"]["rotary_fraction"], settings["model"]["moe"]["router_scaling"]
    facts = {"data": {"vocab_size": 300}, **settings}
    write_step(make().run_path / "checkpoints", 4, facts)
    refuse_mismatch(make())
    assert told(make("model.rotary_fraction=0.5")) == {"model.rotary_fraction": ("1.0", "0.5")}
