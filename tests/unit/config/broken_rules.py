"""Settings that break a rule, and what must be said of them."""

from dataclasses import replace
from typing import Any

from hysparse_megatron.architecture.model import Backend, Balancing, Fp8, Layers, MoeConfig
from hysparse_megatron.architecture.rope import RopeScalingConfig, RopeType
from hysparse_megatron.config.debug import ProfileConfig
from hysparse_megatron.config.schema import (
    GuardConfig,
    MuonConfig,
    OptimizerName,
    Precision,
    Recompute,
    RecomputeModule,
    Schedule,
)

INSTANCES = "parallel.num_distributed_optimizer_instances"


YARN = RopeScalingConfig(type=RopeType.yarn, factor=4.0, original_max_position_embeddings=64)


def experts(num_experts: int, **settings: Any) -> MoeConfig:
    return MoeConfig(num_experts=num_experts, **settings)


def profiled(**settings: Any) -> dict[str, Any]:
    return {"debug.profile": ProfileConfig(**settings)}


def parts(*modules: RecomputeModule) -> dict[str, Any]:
    return {"train.recompute": Recompute.selective, "train.recompute_modules": list(modules)}


OFFLOAD = {"train.offload_activations": True}
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
    (
        {"train.guard": GuardConfig(spike_window=10**20)},
        "train.guard.spike_window",
        "1000",
        "at most 100000",
    ),
    ({"data.skip_steps": f"0-{10**20}"}, "data.skip_steps", "0-1000", "no run has more than"),
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
        {"train.offload_min_bytes": 1000},
        "train.offload_min_bytes",
        "1000",
        "1048576, the default, unless train.offload_activations=true",
    ),
    (
        {**OFFLOAD, "train.offload_min_bytes": -1},
        "train.offload_min_bytes",
        "-1",
        "at least 0",
    ),
    ({**FP8, **OFFLOAD}, "train.offload_activations", "true", "false with model.fp8=tensorwise"),
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
    (
        {**FP8, "parallel.cp": 4, "train.seq_length": 528, "model.window": 8},
        "train.seq_length",
        "528 (x train.micro_batch_size = 2 / parallel.cp = 4)",
        "a multiple of 16 tokens",
    ),
    # Of full layers; those of sparse ones, with their gates, are 120.
    (
        {**FP8, "model.head_dim": 28, "model.value_head_dim": 32},
        "model.num_attention_heads",
        "116 columns a rank",
        "a multiple of 16",
    ),
    ({**FP8, "model.value_head_dim": 36}, "model.value_head_dim", "72 columns", "multiple of 16"),
    (
        {**FP8, "model.moe": experts(8, shared_expert_ffn_hidden_size=48)},
        "model.moe.shared_expert_ffn_hidden_size",
        "24 columns",
        "a multiple of 16",
    ),
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
    (
        {"model.block_size": 1, "train.seq_length": 32896, "train.precision": Precision.bf16},
        "model.block_size",
        "1 (32,896 blocks of train.seq_length = 32,896)",
        "32,639 blocks at most with a pipeline cut inside a hybrid block",
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
