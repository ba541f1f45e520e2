"""Composing presets and overrides, and refusing wrong ones by name."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from math import lcm
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.architecture.stages import live_oracle, stage_layers
from hysparse_megatron.config import compose as compose_module
from hysparse_megatron.config.compose import (
    GROUPS,
    SECTIONS,
    compose,
    config_directory,
    group_options,
)
from hysparse_megatron.config.describe import ALIASES, all_keys
from hysparse_megatron.config.frozen import from_yaml, to_yaml
from hysparse_megatron.config.schema import Precision, Schedule, TrackingMode
from hysparse_megatron.config.validate import validate
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.plan.suggest import check
from tests.captured import captured

PRESETS = [(group, option) for group in GROUPS for option in group_options(group)]


def test_every_group_has_a_preset() -> None:
    assert {group for group, _ in PRESETS} == {*SECTIONS, "experiment"}


@pytest.mark.parametrize(("group", "option"), PRESETS)
def test_every_preset_composes_and_is_valid(group: str, option: str) -> None:
    config = compose([f"{group}={option}"])
    parallel = config.parallel
    ranks = parallel.pp * lcm(parallel.tp * parallel.cp, parallel.ep)
    assert validate(config, world_size=ranks) == []


def test_defaults() -> None:
    config = compose([])
    assert (config.name, config.run_dir) == ("run", "runs/run")
    assert config.run_path == Path("runs/run")
    assert config.tracking.mode is TrackingMode.off
    assert config.model.rotary_dim == config.model.value_dim == config.model.head_dim
    optim = config.optim
    assert (optim.beta1, optim.beta2, optim.epsilon) == (0.9, 0.95, 1e-10)
    assert (optim.weight_decay, optim.clip_grad) == (0.1, 1.0)


def test_decay_defaults() -> None:
    optim = replace(compose([]).optim, warmup_steps=10, decay_steps=None)
    assert optim.num_decay_steps(200) == 20
    assert replace(optim, schedule=Schedule.cosine).num_decay_steps(200) == 190
    assert replace(optim, schedule=Schedule.constant).num_decay_steps(200) == 0
    assert replace(optim, decay_steps=7).num_decay_steps(200) == 7


@pytest.mark.parametrize("baseline", ["tiny_full", "tiny_hybrid_swa"])
def test_baselines_differ_only_in_layout(baseline: str) -> None:
    ours, theirs = compose(["model=tiny_hysparse"]), compose([f"model={baseline}"])
    assert ours.model.layout != theirs.model.layout
    assert replace(theirs, model=replace(theirs.model, layout=ours.model.layout)) == ours
    layers = {parse_layout(config.model.layout).num_layers for config in (ours, theirs)}
    assert layers == {9}


def test_tiny_models_are_sparse_at_their_sequence_length() -> None:
    config = compose([])
    model, seq_length = config.model, config.train.seq_length
    assert model.block_size * model.num_selected_blocks <= seq_length / 4
    assert model.window <= seq_length / 8


def test_quickstart_cuts_inside_the_second_block() -> None:
    config = compose(["experiment=quickstart"])
    layout = parse_layout(config.model.layout)
    stages = stage_layers(layout, config.parallel.pp)
    assert (config.parallel.tp, config.parallel.pp) == (2, 2)
    assert config.parallel.sequence_parallel
    assert live_oracle(layout, stages[1].start) == 4
    assert layout.layers == parse_layout(compose([]).model.layout).layers


def test_overrides_win_over_presets() -> None:
    config = compose(
        ["experiment=quickstart", "train.precision=bf16", "name=other", "++train.steps=7"]
    )
    assert config.train.precision is Precision.bf16
    assert config.train.steps == 7
    assert config.run_dir == "runs/other"


@pytest.mark.parametrize(
    "words",
    [
        ["train.steps=7", "experiment=recipe_160m"],
        ["experiment=recipe_160m", "train.steps=7", "train.steps=8"],
        ["+data.evaluation.code=x", "++model.window=5", "data.evaluation.prose=y"],
        ["~data.evaluation", "model=tiny_full", "model.layout=F F"],
        ["model={layout: F}", "train.batch_ramp=[1,2,3]", "checkpoint=null"],
        ["train.steps=${optim.warmup_steps}", "name='${model.layout} a'"],
        ["checkpoint@train=default"],
        ["+model@other=tiny_full"],
        ["train.nonsense=1"],
        ["+train.steps=1"],
        ["~train.nonsense"],
        ["experiment=nowhere"],
        ["train.steps="],
        ["train.steps=[1"],
    ],
)
def test_presets_and_values_come_together_as_hydra_puts_them(words: list[str]) -> None:
    """Presets are read once for many values, which Hydra's own composition does not do."""

    def outcome(way: Callable[[], Any]) -> Any:
        try:
            return way()
        except Exception as error:
            return type(error)

    def by_hydra() -> Any:
        return OmegaConf.to_container(hydra.compose("config", overrides=words), resolve=True)

    with hydra.initialize_config_dir(config_dir=str(config_directory()), version_base="1.3"):
        assert outcome(lambda: compose_module._compose_tree((), words)) == outcome(by_hydra)


@pytest.mark.parametrize("plus", ["+", "++"])
def test_a_group_may_have_a_plus(plus: str) -> None:
    """Hydra wants one for a group that no default names, and users write it everywhere."""
    assert compose([f"{plus}experiment=quickstart"]) == compose(["experiment=quickstart"])
    assert compose([f"{plus}model=tiny_full"]) == compose(["model=tiny_full"])


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "optim.learning_rate"),
        ("optim.lr", "optim.learning_rate"),
        ("train.lr", "optim.learning_rate"),
        ("+lr", "optim.learning_rate"),
        ("learning_rate", "optim.learning_rate"),
        ("learning_rat", "optim.learning_rate or optim.min_learning_rate"),
        ("batch_size", "train.global_batch_size or train.micro_batch_size"),
        ("seq_len", "train.seq_length"),
        ("steps", "train.steps"),
        ("max_steps", "train.steps"),
        ("wandb", "tracking.mode"),
        ("wandb_mode", "tracking.mode"),
        ("tp", "parallel.tp"),
        ("moe.num_experts", "model.moe.num_experts"),
        ("num_layers", "model.layout"),
        ("data_path", "data.path"),
        ("train.bf16", "train.precision"),
    ],
)
def test_a_key_of_elsewhere_is_led_to_its_setting(key: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([f"{key}=3"])
    (problem,) = caught.value.problems
    assert (problem.key, problem.got) == (key.lstrip("+"), "an unknown key")
    assert problem.allowed.endswith(f" (did you mean {meant}?)")


def test_names_of_elsewhere_lead_to_settings_that_exist() -> None:
    for names, meant in ALIASES.items():
        assert set(meant) <= set(all_keys())
        for name in names.split():
            assert name not in all_keys()


@pytest.mark.parametrize(
    "override",
    ["model.layout=2*(F 3*S) F", "model.layout='2*(F 3*S) F'", '++model.layout="2*(F 3*S) F"'],
)
def test_a_layout_needs_no_quotes_of_its_own(override: str) -> None:
    assert compose([override]).model.layout == "2*(F 3*S) F"


@pytest.mark.parametrize("override", ["data.blend=3 a; 1 b/c", "data.blend='3 a; 1 b/c'"])
def test_nor_does_a_blend(override: str) -> None:
    assert compose([override]).data.blend == "3 a; 1 b/c"


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.evaluation={code: data/code, wiki: 'a b/c'}"],
        ["data.evaluation.code=data/code", "+data.evaluation.wiki='a b/c'"],
    ],
)
def test_named_values(overrides: list[str]) -> None:
    config = compose(overrides)
    assert config.data.evaluation == {"code": "data/code", "wiki": "a b/c"}
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize(
    ("override", "key", "got", "allowed"),
    [
        ("train.stepz=3", "train.stepz", "unknown key", "did you mean steps?"),
        ("+train.foo=3", "train.foo", "unknown key", "global_batch_size"),
        ("+foo=3", "foo", "unknown key", "run_dir"),
        ("mdl=tiny_full", "mdl", "unknown key", "did you mean model?"),
        ("train.steps.x=3", "train.steps.x", "unknown key", "train.steps is an integer"),
        ("+train.steps=3", "train.steps", "a + before", "train.steps=3, without"),
        ("~train.foo", "train.foo", "unknown key", "steps"),
        ("~train.steps", "train.steps", "a deletion", "an integer"),
        ("train.steps=many", "train.steps", "many", "an integer"),
        ("train.steps=null", "train.steps", "null", "an integer"),
        ("train.steps=1.5", "train.steps", "1.5", "an integer"),
        ("parallel.vpp=x", "parallel.vpp", "x", "an integer or null"),
        ("optim.beta1=x", "optim.beta1", "x", "a number"),
        ("checkpoint.resume=7x", "checkpoint.resume", "7x", "true or false"),
        ("train.precision=fp8", "train.precision", "fp8", "one of fp32, bf16"),
        ("model.gate=token", "model.gate", "token", "one of head, channel"),
        ("model=huge", "model", "huge", "tiny_full, tiny_hybrid_swa, tiny_hysparse"),
        ("experiment=none", "experiment", "none", "quickstart"),
        ("experiment=quickstrt", "experiment", "quickstrt", "did you mean quickstart?"),
        ("model=tiny_ful", "model", "tiny_ful", "did you mean tiny_full?"),
        ("experiment@=quickstart", "experiment@", "a package", "experiment=quickstart, without"),
        ("model@a.b=tiny_full", "model@a.b", "a package", "model=tiny_full, without"),
        ("optim.schedule=cosin", "optim.schedule", "cosin", "did you mean cosine?"),
        ("train=5", "train", "5", "one of default"),
        ("data.evaluation=x", "data.evaluation", "x", "names with texts"),
        ("data.evaluation.code=[1]", "data.evaluation.code", "[1]", "a text"),
        (
            "data.evaluation.a.b=x",
            "data.evaluation.a.b",
            "unknown key",
            "data.evaluation.a is a text",
        ),
        ("~data.evaluation", "data.evaluation", "a deletion", "names with texts"),
        ("data.skip_steps=1,5", "data.skip_steps", "1,5", "\"data.skip_steps='1,5'\""),
        ("tracking.tags=a,b", "tracking.tags", "a,b", "quoted twice"),
        ("run_dir=range(1,3)", "run_dir", "range(1,3)", "one text"),
        ("a b", "a b", "unreadable override", "key=value"),
        ("name=[x", "name=[x", "unreadable override", "key=value"),
        ("hydra.run.dir=x", "hydra.run.dir", "Hydra itself", "run_dir"),
    ],
)
def test_a_wrong_override_is_named(override: str, key: str, got: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([override])
    (problem,) = caught.value.problems
    assert problem.key == key
    assert got in problem.got
    assert allowed in problem.allowed
    assert all(text in str(caught.value) for text in (key, got, allowed))


def test_all_wrong_overrides_are_listed() -> None:
    bad = ["train.steps=x", "optim.betas=1", "train.precision=fp8", "model=huge", "+foo=1"]
    with pytest.raises(ConfigError) as caught:
        compose([*bad, "train.seed=3"])
    keys = [problem.key for problem in caught.value.problems]
    assert keys == ["train.steps", "optim.betas", "train.precision", "model", "foo"]
    assert str(caught.value).startswith("5 problems")


def test_local_settings_are_between_presets_and_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = shutil.copytree(config_directory(), tmp_path / "conf")
    (conf / "local").mkdir(exist_ok=True)
    local = conf / "local" / "local.yaml"
    local.write_text("train: {steps: 11, seed: 5}\ntracking: {mode: 'off'}\n")
    monkeypatch.setattr(compose_module, "config_directory", lambda: conf)
    train = compose(["experiment=quickstart", "train.seed=6"]).train
    assert (train.steps, train.seed) == (11, 6)
    for text, told in (
        ("train: {stepz: 11}\n", "stepz"),
        ("tracking: {mode: off}\n", "'False', expected one of .off"),
        ("train: {steps: 11\n", "local.yaml"),
    ):
        local.write_text(text)
        with pytest.raises(ConfigError, match=f"a file under .*local.*{told}"):
            compose(["train.seed=6"])


def test_composing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose(["experiment=quickstart"])
    assert list(tmp_path.iterdir()) == []
    assert Path.cwd() == tmp_path


def test_a_bad_configuration_is_found_without_loading_torch() -> None:
    code = (
        "import sys, hysparse_megatron.architecture.layout\n"
        "from hysparse_megatron.config import cli, validate\n"
        "validate.validate(cli.load(cli.parse_arguments(['train.steps=0'])), world_size=1)\n"
        "print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    )
    done = captured([sys.executable, "-c", code], timeout=30)
    assert done.stdout.strip() == "[]", done.stderr


PAPER_RUNS = [
    # preset, GPUs, tokens, sequence length, highest learning rate, RoPE base
    ("paper_7b_8k", 64, 1.0e12, 8192, 8.3e-4, None),
    ("paper_7b_32k", 64, 0.2e12, 32768, 3.0e-5, 640000),
    ("paper_80b_a3b_32k", 128, 0.5e12, 32768, 1.0e-3, 640000),
]


@pytest.mark.parametrize(("name", "gpus", "tokens", "length", "rate", "base"), PAPER_RUNS)
def test_paper_presets_are_the_papers(
    name: str, gpus: int, tokens: float, length: int, rate: float, base: float | None
) -> None:
    """HySparse (arXiv 2602.03560), Table 1 and section 4.1; the plans fit the named GPUs."""
    config = compose([f"experiment={name}"])
    train, optim = config.train, config.optim
    seen = train.steps * train.global_batch_size * train.seq_length
    assert seen == pytest.approx(tokens, rel=1e-4)
    assert (train.seq_length, train.precision) == (length, Precision.bf16)
    assert (optim.learning_rate, optim.clip_grad, optim.weight_decay) == (rate, 1.0, 0.1)
    assert (optim.beta1, optim.beta2, optim.epsilon) == (0.9, 0.95, 1e-10)
    if base is not None:
        assert config.model.rotary_base == base
    model = "80b_a3b" if "80b" in name else "7b"
    for family in ("hysparse", "full", "hybrid_swa"):
        check(compose([f"experiment={name}", f"model={family}_{model}"]), gpus)


LONG_RUNS = [
    # preset, GPUs, sequence length, context-parallel size
    ("long_7b_128k", 64, 131_072, 8),
    ("long_80b_a3b_128k", 128, 131_072, 16),
    ("long_80b_a3b_256k", 256, 262_144, 32),
    ("long_80b_a3b_1m", 512, 1_048_576, 64),
]


@pytest.mark.parametrize(("name", "gpus", "length", "cp"), LONG_RUNS)
def test_presets_of_long_contexts_fit_the_named_gpus(
    name: str, gpus: int, length: int, cp: int
) -> None:
    config = compose([f"experiment={name}"])
    assert (config.train.seq_length, config.parallel.cp) == (length, cp)
    assert config.train.global_batch_size * length == 2**22
    check(config, gpus)


def test_the_second_stage_continues_the_first() -> None:
    """The same model but for the RoPE base, so that the weights fit."""
    first, second = compose(["experiment=paper_7b_8k"]), compose(["experiment=paper_7b_32k"])
    assert first.model != second.model
    assert replace(first.model, rotary_base=second.model.rotary_base) == second.model
    assert first.optim.min_learning_rate == second.optim.learning_rate
    assert second.optim.schedule is Schedule.constant
