"""Every rule refuses what it should, names the key, and none hides another."""

import importlib.metadata
import importlib.util
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hysparse_megatron.architecture.model import Backend, Balancing, Fp8, Layers, MoeConfig
from hysparse_megatron.architecture.rope import RopeScalingConfig, RopeType
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.debug import ProfileConfig
from hysparse_megatron.config.schema import (
    Config,
    MuonConfig,
    OptimizerName,
    Precision,
    Recompute,
    RecomputeModule,
    Schedule,
    TrackingMode,
)
from hysparse_megatron.config.validate import check, validate, warnings
from hysparse_megatron.errors import ConfigError

INSTANCES = "parallel.num_distributed_optimizer_instances"


@pytest.fixture(scope="module")
def base() -> Config:
    # The numbers that the cases below break rules with, whatever the preset is tuned to.
    sizes = ["train.steps=160", "train.global_batch_size=8", "train.micro_batch_size=2"]
    schedule = ["optim.warmup_steps=10", "optim.decay_steps=32"]
    return compose(["experiment=quickstart", *sizes, *schedule])


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_tensorboard_needs_its_package(base: Config, no_packages: None) -> None:
    assert validate(base, world_size=4) == []
    (problem,) = validate(changed(base, {"tracking.tensorboard": True}), world_size=4)
    assert problem.key == "tracking.tensorboard"
    assert "not installed" in problem.got
    assert "pip install tensorboard" in problem.allowed


def test_steps_that_are_profiled(base: Config) -> None:
    settings = profiled(step_range=[1, 160], ranks=[0, 3])
    assert validate(changed(base, settings), world_size=4) == []
    unused = changed(base, profiled(ranks=[7]))
    assert validate(unused, world_size=4) == []


def changed(config: Config, settings: dict[str, Any]) -> Config:
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        if section:
            value = replace(getattr(config, section), **{name: value})
            name = section
        config = replace(config, **{name: value})
    return config


def test_the_base_is_valid_on_more_ranks_too(base: Config) -> None:
    for world_size in (4, 8, 16):
        assert validate(base, world_size=world_size) == []
    check(base, 4)


YARN = RopeScalingConfig(type=RopeType.yarn, factor=4.0, original_max_position_embeddings=64)


def experts(num_experts: int, **settings: Any) -> MoeConfig:
    return MoeConfig(num_experts=num_experts, **settings)


def profiled(**settings: Any) -> dict[str, Any]:
    return {"debug.profile": ProfileConfig(**settings)}


def parts(*modules: RecomputeModule) -> dict[str, Any]:
    return {"train.recompute": Recompute.selective, "train.recompute_modules": list(modules)}


FP8 = {"model.fp8": Fp8.tensorwise, "train.precision": Precision.bf16}

BAD: list[tuple[dict[str, Any], str, str, str]] = [
    # settings, key, part of got, part of allowed
    ({"model.hidden_size": 0}, "model.hidden_size", "0", "at least 1"),
    ({"train.steps": -1}, "train.steps", "-1", "at least 1"),
    ({"train.seq_length": 1}, "train.seq_length", "1", "at least 2"),
    ({"model.vocab_size": 0}, "model.vocab_size", "0", "at least 1"),
    ({"model.window": 0}, "model.window", "0", "at least 1"),
    ({"checkpoint.interval": 0}, "checkpoint.interval", "0", "at least 1"),
    ({"checkpoint.keep": -1}, "checkpoint.keep", "-1", "at least 0"),
    ({"train.eval_batches": -1}, "train.eval_batches", "-1", "at least 0"),
    ({"data.evaluation": {"validation": "."}}, "data.evaluation", "validation", "other than"),
    ({"data.evaluation": {"a-b": "."}}, "data.evaluation", "a-b", "letters"),
    ({"data.evaluation": {"a": "nowhere"}}, "data.evaluation.a", "nowhere", "that exists"),
    (
        {"data.evaluation": {"a": "."}, "train.eval_batches": 0},
        "data.evaluation",
        "a",
        "nothing with train.eval_batches=0",
    ),
    ({"data.validation_fraction": 0.0}, "data.validation_fraction", "0.0", "eval_batches=0"),
    ({"train.batch_ramp": [2, 2]}, "train.batch_ramp", "[2, 2]", "[start,increment,samples]"),
    (
        {"train.batch_ramp": [2, 0, 9]},
        "train.batch_ramp",
        "[2, 0, 9]",
        "three integers of at least",
    ),
    ({"train.batch_ramp": [8, 2, 9]}, "train.batch_ramp", "[8, 2, 9]", "a start below"),
    (
        {"train.batch_ramp": [2, 4, 9]},
        "train.batch_ramp",
        "[2, 4, 9]",
        "increments that lead there",
    ),
    ({"train.batch_ramp": [5, 1, 9]}, "train.batch_ramp", "5", "micro_batch_size = 2"),
    ({"train.batch_ramp": [4, 1, 9]}, "train.batch_ramp", "5", "micro_batch_size = 2"),
    (
        {"parallel.vpp": 2, "train.batch_ramp": [4, 2, 9]},
        "train.batch_ramp",
        "6 (3 micro-batches on each rank)",
        "parallel.pp = 2",
    ),
    (profiled(step_range=[3]), "debug.profile.step_range", "[3]", "[first,last]"),
    (profiled(step_range=[0, 3]), "debug.profile.step_range", "[0, 3]", "1 <= first <= last"),
    (profiled(step_range=[4, 3]), "debug.profile.step_range", "[4, 3]", "1 <= first <= last"),
    (
        profiled(step_range=[160, 161]),
        "debug.profile.step_range",
        "[160, 161]",
        "up to train.steps = 160",
    ),
    (profiled(step_range=[1, 1], ranks=[]), "debug.profile.ranks", "[]", "at least one"),
    (profiled(step_range=[1, 1], ranks=[-1]), "debug.profile.ranks", "[-1]", "ranks from 0"),
    (profiled(step_range=[1, 1], ranks=[0, 4]), "debug.profile.ranks", "[0, 4]", "which is 4"),
    ({"optim.learning_rate": 0.0}, "optim.learning_rate", "0.0", "above 0"),
    ({"optim.learning_rate": float("nan")}, "optim.learning_rate", "nan", "above 0"),
    ({"optim.clip_grad": float("inf")}, "optim.clip_grad", "inf", "at least 0"),
    ({"optim.beta2": 1.0}, "optim.beta2", "1.0", "below 1"),
    ({"model.hidden_dropout": -0.1}, "model.hidden_dropout", "-0.1", "at least 0"),
    ({"data.validation_fraction": 1.0}, "data.validation_fraction", "1.0", "below 1"),
    ({"name": "a/b"}, "name", "a/b", "letters"),
    ({"tracking.straggler_interval": 0}, "tracking.straggler_interval", "0", "at least 1"),
    ({"tracking.straggler_factor": 0.0}, "tracking.straggler_factor", "0.0", "above 0"),
    ({"data.blend": "data/web"}, "data.blend", "data/web", "a positive weight and a path"),
    ({"data.blend": "1 .", "data.path": "."}, "data.path", ".", "null with data.blend"),
    ({"data.blend": "1 .", "data.tokenizer": "."}, "data.tokenizer", ".", "null with data.blend"),
    ({"data.blend": "1 .; 2 nowhere"}, "data.blend", "nowhere", "hysparse prepare-data"),
    ({"data.skip_steps": "9-3"}, "data.skip_steps", "9-3", "comes after the last"),
    (
        {**FP8, **parts(RecomputeModule.norm)},
        "train.recompute_modules",
        "norm",
        "[attention] with model.fp8",
    ),
    (
        {"train.recompute_modules": [RecomputeModule.norm]},
        "train.recompute_modules",
        "[norm]",
        "[attention], the default, unless train.recompute=selective",
    ),
    (parts(), "train.recompute_modules", "[]", "at least one"),
    (
        parts(RecomputeModule.norm, RecomputeModule.norm),
        "train.recompute_modules",
        "[norm,norm]",
        "each once",
    ),
    (
        parts(RecomputeModule.norm, RecomputeModule.experts),
        "train.recompute_modules",
        "[norm,experts]",
        "without experts: no layer",
    ),
    (
        {"train.recompute_layers": 2},
        "train.recompute_layers",
        "2",
        "null unless train.recompute=full",
    ),
    ({**FP8, "train.precision": Precision.fp32}, "train.precision", "fp32", "bf16 with model.fp8"),
    ({**FP8, "train.recompute": Recompute.full}, "train.recompute", "full", "none or selective"),
    ({**FP8, "model.layers": Layers.local}, "model.layers", "local", "te or auto"),
    ({**FP8, "train.seq_length": 250}, "train.seq_length", "250", "a multiple of 16 tokens"),
    ({**FP8, "model.hidden_size": 136}, "model.hidden_size", "136", "a multiple of 16"),
    ({"model.layout": "F 3*x"}, "model.layout", "F 3*x", "unknown layer 'x'"),
    ({"model.layout": "F|S|S"}, "model.layout", "F|S|S", "parallel.pp = 2"),
    ({"model.layout": "F"}, "model.layout", "F", "1 layers cannot fill 2"),
    ({"model.num_attention_heads": 5}, "model.num_attention_heads", "5", "parallel.tp = 2"),
    ({"model.num_query_groups": 3}, "model.num_query_groups", "3", "divisor of parallel.tp = 2"),
    (
        {"model.num_query_groups": 8},
        "model.num_attention_heads",
        "4",
        "model.num_query_groups = 8",
    ),
    (
        {"model.num_query_groups": 1, "model.value_head_dim": 33},
        "model.value_head_dim",
        "33",
        "parallel.tp = 2",
    ),
    ({"model.ffn_hidden_size": 351}, "model.ffn_hidden_size", "351", "parallel.tp = 2"),
    ({"model.rotary_fraction": 1.5}, "model.rotary_fraction", "1.5", "at most 1"),
    ({"model.rotary_fraction": 0.1}, "model.rotary_fraction", "3.2 of 32", "even number"),
    (
        {"model.rope_scaling": RopeScalingConfig(type=RopeType.llama3, factor=8.0)},
        "model.rope_scaling.original_max_position_embeddings",
        "null",
        "a number with model.rope_scaling.type = llama3",
    ),
    (
        {"model.rope_scaling": RopeScalingConfig(type=RopeType.linear, factor=0.5)},
        "model.rope_scaling.factor",
        "0.5",
        "at least 1",
    ),
    (
        {"model.rope_scaling": RopeScalingConfig(factor=4.0)},
        "model.rope_scaling.factor",
        "4.0",
        "null with model.rope_scaling.type = none, which does not read it",
    ),
    (
        {"model.rope_scaling": RopeScalingConfig(type=RopeType.linear, factor=2, beta_slow=2.0)},
        "model.rope_scaling.beta_slow",
        "2.0",
        "1.0 with model.rope_scaling.type = linear",
    ),
    (
        {"model.rope_scaling": replace(YARN, beta_fast=0.5)},
        "model.rope_scaling.beta_slow",
        "1.0 (and beta_fast 0.5)",
        "below beta_fast",
    ),
    (
        {"model.rope_scaling": YARN, "model.rotary_base": 1.0},
        "model.rotary_base",
        "1.0",
        "above 1 with model.rope_scaling.type = yarn",
    ),
    ({"model.block_size": 513}, "model.block_size", "513", "train.seq_length = 512"),
    (
        {"model.forced_first_blocks": 5, "model.forced_recent_blocks": 4},
        "model.forced_first_blocks",
        "5 + 4",
        "model.num_selected_blocks = 8",
    ),
    ({"parallel.cp": 3}, "train.seq_length", "512", "a multiple of 6, such as 510 or 516"),
    (
        {"parallel.cp": 4, "model.window": 66},
        "parallel.cp",
        "4",
        "at most 3: of 8 chunks of 512 tokens each must hold the 65 tokens before a window",
    ),
    (
        {
            "parallel.cp": 2,
            "parallel.cp_keep_kv": False,
            "data.document_mask": True,
            "train.micro_batch_size": 2,
        },
        "parallel.cp_keep_kv",
        "false",
        "true: with data.document_mask",
    ),
    ({"parallel.cp_keep_kv": False}, "parallel.cp_keep_kv", "false", "while parallel.cp = 1"),
    (
        {"tracking.sample_prompt": "if", "tracking.sample_tokens": 0},
        "tracking.sample_prompt",
        "if",
        "sample_tokens = 0",
    ),
    ({INSTANCES: 0}, INSTANCES, "0", "at least 1"),
    ({INSTANCES: 2}, INSTANCES, "2", "a divisor of the 1 ranks with the same parameters"),
    ({INSTANCES: 2, "optim.name": OptimizerName.muon}, INSTANCES, "2", "1 with optim.name = muon"),
    (
        {"model.moe": experts(8), "parallel.pp": 1, "parallel.ep": 4, INSTANCES: 2},
        INSTANCES,
        "2",
        "a divisor of the 1 ranks with the same experts",
    ),
    ({"parallel.ep": 2}, "parallel.ep", "2", "dense"),
    ({"model.moe": MoeConfig(num_experts=-1)}, "model.moe.num_experts", "-1", "at least 0"),
    ({"model.moe": experts(4)}, "model.moe.num_active_experts", "8", "num_experts = 4"),
    (
        {"model.moe": experts(8, num_active_experts=1)},
        "model.moe.num_active_experts",
        "1",
        "at least 2 with softmax",
    ),
    (
        {"model.moe": experts(8, balancing=Balancing.bias)},
        "model.moe.balancing",
        "bias",
        "router_score = sigmoid",
    ),
    ({"model.moe": experts(8), "parallel.ep": 3}, "parallel.ep", "3", "1, 2, 4, 8"),
    ({"model.moe": experts(8), "parallel.ep": 8}, "parallel.ep", "= 16 ranks", "which is 4"),
    (
        {"model.moe": experts(8, num_dense_first_layers=5)},
        "model.moe.num_dense_first_layers",
        "5",
        "at most 4",
    ),
    (
        {"model.moe": experts(8, shared_expert_ffn_hidden_size=7)},
        "model.moe.shared_expert_ffn_hidden_size",
        "7",
        "parallel.tp = 2",
    ),
    (
        {"model.moe": experts(8), "parallel.sequence_parallel": False},
        "parallel.sequence_parallel",
        "false",
        "true with experts",
    ),
    ({"cluster.memory_gib": 0.0}, "cluster.memory_gib", "0.0", "above 0"),
    ({"parallel.vpp": 1}, "parallel.vpp", "1", "at least 2"),
    ({"parallel.pp": 1, "parallel.vpp": 2}, "parallel.vpp", "2", "parallel.pp = 1"),
    ({"parallel.tp": 1}, "parallel.sequence_parallel", "true", "parallel.tp = 1"),
    ({"train.seq_length": 511}, "train.seq_length", "511", "parallel.tp = 2"),
    ({"parallel.tp": 3}, "parallel.tp", "= 6 ranks", "world size, which is 4"),
    ({"train.global_batch_size": 7}, "train.global_batch_size", "7", "micro_batch_size = 2"),
    (
        {"parallel.vpp": 2, "train.global_batch_size": 6},
        "train.global_batch_size",
        "3 micro-batches",
        "parallel.pp = 2",
    ),
    ({"optim.min_learning_rate": 1.0}, "optim.min_learning_rate", "1.0", "optim.learning_rate"),
    ({"optim.warmup_steps": 150}, "optim.warmup_steps", "150", "train.steps = 160"),
    (
        {"optim.schedule": Schedule.constant, "optim.warmup_steps": 161},
        "optim.warmup_steps",
        "161",
        "train.steps = 160",
    ),
    ({"model.backend": Backend.triton}, "model.backend", "triton", "with train.precision=fp32"),
    ({"optim.muon": MuonConfig(num_ns_steps=0)}, "optim.muon.num_ns_steps", "0", "at least 1"),
    ({"optim.muon": MuonConfig(momentum=1.0)}, "optim.muon.momentum", "1.0", "below 1"),
    (
        {"optim.muon": MuonConfig(extra_scale_factor=0.0)},
        "optim.muon.extra_scale_factor",
        "0.0",
        "above 0",
    ),
    (
        {"optim.name": OptimizerName.muon, "model.moe": experts(8)},
        "parallel.ep",
        "1",
        "parallel.tp = 2 with optim.name = muon and data-parallel size 1",
    ),
    ({"data.path": "/nowhere/text"}, "data.path", "/nowhere/text", "exists"),
    ({"data.tokenizer": "/nowhere/t"}, "data.tokenizer", "/nowhere/t", "exists"),
    ({"checkpoint.load": "/nowhere/c"}, "checkpoint.load", "/nowhere/c", "exists"),
]


@pytest.mark.parametrize(
    ("settings", "key", "got", "allowed"), BAD, ids=[" ".join(case[0]) for case in BAD]
)
def test_every_rule(
    base: Config, settings: dict[str, Any], key: str, got: str, allowed: str
) -> None:
    problems = validate(changed(base, settings), world_size=4)
    matching = [problem for problem in problems if problem.key == key and got in problem.got]
    assert sum(allowed in problem.allowed for problem in matching) == 1
    with pytest.raises(ConfigError) as caught:
        check(changed(base, settings), 4)
    assert caught.value.exit_code == 2
    assert len(caught.value.problems) == len(problems)
    message = str(caught.value)
    assert f"{key}:" in message
    assert got in message
    assert allowed in message


def test_instances_of_the_optimizer_are_equal_parts(base: Config) -> None:
    for instances in (1, 2, 4):
        assert validate(changed(base, {INSTANCES: instances}), world_size=16) == []
    (problem,) = validate(changed(base, {INSTANCES: 3}), world_size=16)
    assert problem.allowed == "a divisor of the 4 ranks with the same parameters"


def test_a_group_may_be_shared_by_ranks(base: Config) -> None:
    one_group = changed(base, {"model.num_query_groups": 1})
    assert validate(one_group, world_size=4) == []


def test_muon_is_valid_where_its_matrices_are_whole(base: Config) -> None:
    muon = changed(base, {"optim.name": OptimizerName.muon})
    assert validate(muon, world_size=4) == []
    assert validate(changed(muon, {"model.num_query_groups": 1}), world_size=4) == []
    with_experts = changed(muon, {"model.moe": experts(8)})
    assert validate(with_experts, world_size=8) == []
    assert validate(changed(with_experts, {"parallel.ep": 2}), world_size=4) == []


@pytest.mark.parametrize("installed", [None, "0.1.0", "0.31.0"])
def test_muon_without_its_package(
    base: Config, monkeypatch: pytest.MonkeyPatch, installed: str | None
) -> None:
    def version(package: str) -> str:
        assert package == "emerging-optimizers"
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert validate(base, world_size=4) == []
    with pytest.raises(ConfigError) as caught:
        check(changed(base, {"optim.name": OptimizerName.muon}), 4)
    (problem,) = caught.value.problems
    assert problem.key == "optim.name"
    assert (installed or "not installed") in problem.got
    assert "pip install 'emerging-optimizers~=0.3.0'" in problem.allowed
    assert caught.value.exit_code == 2


def test_all_problems_at_once_and_quickly(base: Config) -> None:
    settings = {key: value for case in BAD[:40] for key, value in case[0].items()}
    settings |= {"parallel.tp": 3, "parallel.pp": 2, "model.layout": "S F"}
    bad = changed(base, settings)
    start = time.process_time()
    problems = validate(bad, world_size=4)
    assert time.process_time() - start < 0.5
    assert len(problems) >= 20
    with pytest.raises(ConfigError) as caught:
        check(bad, 4)
    lines = str(caught.value).splitlines()
    columns = {line.index(" got ") for line in lines if " got " in line}
    assert len(columns) == 1
    for problem in problems:
        assert sum(line.startswith(f"  {problem.key}:") for line in lines) >= 1


def test_the_caret_of_a_layout_stays_under_its_character(base: Config) -> None:
    with pytest.raises(ConfigError) as caught:
        check(changed(base, {"model.layout": "F 3*S x"}), 4)
    lines = str(caught.value).splitlines()
    shown = next(index for index, line in enumerate(lines) if line.strip() == "F 3*S x")
    assert lines[shown].index("x") == lines[shown + 1].index("^")


@pytest.mark.parametrize("name", ["file", "file/below", "file/far/below"])
def test_a_run_directory_under_a_file(base: Config, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (problem,) = validate(changed(base, {"run_dir": str(tmp_path / name)}), world_size=4)
    assert problem.key == "run_dir"
    assert "file is not a directory" in problem.got


def test_a_run_directory_that_cannot_be_written(base: Config) -> None:
    (problem,) = validate(changed(base, {"run_dir": "/proc/self/run"}), world_size=4)
    assert problem.key == "run_dir"


def test_checking_a_run_directory_leaves_no_trace(base: Config, tmp_path: Path) -> None:
    assert validate(changed(base, {"run_dir": str(tmp_path / "a" / "b")}), world_size=4) == []
    assert list(tmp_path.iterdir()) == []


def test_a_prepared_dataset_is_named_by_its_stem(base: Config, tmp_path: Path) -> None:
    (tmp_path / "corpus.idx").write_bytes(b"")
    assert validate(changed(base, {"data.path": str(tmp_path / "corpus")}), world_size=4) == []


def test_online_tracking_without_a_key_is_a_warning(
    base: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    online = changed(base, {"tracking.mode": TrackingMode.online})
    assert validate(online, world_size=4) == []
    assert len(warnings(online)) == 1
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert warnings(online) == warnings(base) == []
