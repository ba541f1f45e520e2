"""Which layers are chosen and why, and what a checkpoint may hold; see also tests/gpu."""

import importlib.util
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.model import ModelConfig
from hysparse_megatron.checkpoint.state import _load_weights
from hysparse_megatron.config.compose import compose
from hysparse_megatron.errors import CheckpointError, ConfigError
from hysparse_megatron.model.layers import (
    LOCAL,
    LayerChoice,
    LayerModules,
    describe_layers,
    fuse_weight_gradients,
    fusions,
    groups_experts,
    resolve_layers,
)
from hysparse_megatron.model.megatron_config import make_megatron_config
from hysparse_megatron.model.norm import CompiledRMSNorm, RMSNorm
from hysparse_megatron.model.projection import GroupedProjection
from hysparse_megatron.model.spec import layer_spec

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def model(*overrides: str) -> ModelConfig:
    return compose(["model=tiny_hysparse", *overrides]).model


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_a_cpu_has_local_layers() -> None:
    choice = resolve_layers(model(), CPU)
    assert (choice.name, choice.on_cuda) == ("local", False)
    assert "needs a CUDA device, this is cpu" in describe_layers(choice, model())


def test_a_gpu_without_the_package_too(no_packages: None) -> None:
    choice = resolve_layers(model(), CUDA)
    assert (choice.name, choice.on_cuda) == ("local", True)
    assert "transformer-engine is not installed" in choice.reason
    assert resolve_layers(model("model.layers=local"), CUDA).reason == "model.layers is local"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.layers=te"], "model.layers: te cannot run: the package transformer-engine"),
        (["model.fp8=tensorwise"], "model.fp8: tensorwise needs Transformer Engine"),
        (["model.fp8=blockwise", "model.layers=local"], "but model.layers is local"),
    ],
)
def test_what_cannot_run_is_refused(overrides: list[str], message: str, no_packages: None) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_layers(model(*overrides), CUDA)


def test_apex_is_taken_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    present = {"fused_weight_gradient_mlp_cuda"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: SimpleNamespace() if name in present else None
    )
    choice = resolve_layers(model(), CUDA)
    assert fusions(choice, model())["gradient_accumulation_fusion"]
    assert "apex's fused accumulation" in describe_layers(choice, model())
    assert not resolve_layers(model(), CPU).apex_weight_gradients
    apart = replace(choice, sums_weight_gradients=False)
    assert not fusions(apart, model())["gradient_accumulation_fusion"]
    assert "after the matrix products" in describe_layers(apart, model())


def test_weight_gradients_are_fused_without_apex() -> None:
    """Where Transformer Engine has the layers; megatron-core's own need apex for it."""

    class Engine(torch.nn.Linear):
        fuse_wgrad_accumulation = False

    def layers() -> torch.nn.Sequential:
        return torch.nn.Sequential(torch.nn.Sequential(Engine(2, 2)), torch.nn.Linear(2, 2))

    with_engine, without = layers(), layers()
    engine = LayerChoice(True, "", on_cuda=True)
    fuse_weight_gradients(engine, with_engine)
    fuse_weight_gradients(LOCAL, without)
    assert with_engine[0][0].fuse_wgrad_accumulation
    assert not hasattr(with_engine[1], "fuse_wgrad_accumulation")
    assert not without[0][0].fuse_wgrad_accumulation
    assert not fusions(engine, model())["gradient_accumulation_fusion"], "that of apex"
    assert "inside the matrix products" in describe_layers(engine, model())
    apart = layers()
    fuse_weight_gradients(replace(engine, sums_weight_gradients=False), apart)
    assert not apart[0][0].fuse_wgrad_accumulation


@pytest.mark.parametrize(
    ("settings", "by_hooks"),
    [
        ([], False),
        (["train.recompute=full"], False),
        (["train.recompute=full", "train.offload_activations=true"], False),
        (["train.offload_activations=true"], True),
        (
            ["train.recompute=full", "train.recompute_layers=1", "train.offload_activations=true"],
            True,
        ),
        (["train.recompute=selective", "train.recompute_modules=[norm]"], True),
    ],
)
def test_weights_that_come_out_of_hooks_are_not_added_to_inside(
    settings: list[str], by_hooks: bool
) -> None:
    assert compose(settings).train.saves_weights_by_hooks is by_hooks


ON_GPU = LayerChoice(False, "", on_cuda=True)
WITH_ENGINE = LayerChoice(True, "", on_cuda=True)
YARN = [
    *("model.rope_scaling.type=yarn", "model.rope_scaling.factor=4"),
    "model.rope_scaling.original_max_position_embeddings=512",
]


@pytest.mark.parametrize(
    ("choice", "scaling", "told"),
    [
        (LOCAL, [], None),
        (ON_GPU, [], "projections' parts, rotation, loss and the gradients of norms"),
        (WITH_ENGINE, [], "projections' parts"),
        # Which has no rotation with a factor on cosines and sines.
        (WITH_ENGINE, YARN, "projections' parts and rotation"),
    ],
)
def test_what_is_compiled_is_what_no_engine_brings(
    choice: LayerChoice, scaling: list[str], told: str | None
) -> None:
    config = compose(scaling)
    found = re.search(r", ([a-z', ]+) compiled", describe_layers(choice, config.model))
    assert (found and found[1]) == told
    if fusions(choice, config.model)["apply_rope_fusion"]:
        return  # megatron-core refuses that where the engine is not installed
    assert make_megatron_config(config, choice).compiled_inputs is (told is not None)


@pytest.mark.parametrize("deterministic", [False, True])
def test_every_model_on_a_gpu_has_a_fused_loss(deterministic: bool) -> None:
    """Those that are loaded for evaluation, and megatron-core's own around our layers, too."""
    for choice in ON_GPU, WITH_ENGINE, LOCAL:
        found = fusions(choice, model(), deterministic)
        assert found["cross_entropy_loss_fusion"] is choice.on_cuda
        engine = choice is WITH_ENGINE and not deterministic
        assert found["cross_entropy_fusion_impl"] == ("te" if engine else "native")


def test_norms_on_a_gpu_have_compiled_gradients() -> None:
    on_gpu = LayerModules.of(ON_GPU)
    assert (on_gpu.norm, on_gpu.head_norm) == (CompiledRMSNorm, CompiledRMSNorm)
    on_cpu = LayerModules.of(LOCAL)
    assert (on_cpu.norm, on_cpu.head_norm) == (RMSNorm, RMSNorm)


EXPERTS = ["model.moe.num_experts=4", "model.moe.num_active_experts=2"]
ON_HOPPER = LayerChoice(False, "", on_cuda=True, grouped_products=True)


@pytest.mark.parametrize(
    ("choice", "overrides", "precision", "grouped"),
    [
        (ON_HOPPER, EXPERTS, "bf16", True),
        (ON_HOPPER, EXPERTS, "fp32", False),
        (ON_HOPPER, [], "bf16", False),
        (ON_HOPPER, [*EXPERTS, "model.moe.expert_ffn_hidden_size=36"], "bf16", False),
        (ON_HOPPER, ["model.moe.num_experts=1024"], "bf16", False),
        (replace(ON_HOPPER, grouped_products=False), EXPERTS, "bf16", False),
        (replace(ON_HOPPER, transformer_engine=True), EXPERTS, "bf16", False),
        (replace(ON_HOPPER, apex_weight_gradients=True), EXPERTS, "bf16", False),
        (
            replace(ON_HOPPER, apex_weight_gradients=True, sums_weight_gradients=False),
            EXPERTS,
            "bf16",
            True,
        ),
        (LOCAL, EXPERTS, "bf16", False),
    ],
    ids=lambda value: None if isinstance(value, LayerChoice | list) else str(value),
)
def test_which_experts_are_grouped(
    choice: LayerChoice, overrides: list[str], precision: str, grouped: bool
) -> None:
    config = compose(["model=tiny_hysparse", *overrides, f"train.precision={precision}"])
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert groups_experts(choice, config.model, dtype) is grouped
    if not choice.transformer_engine:  # of which megatron-core asks whether it is there
        assert make_megatron_config(config, choice).grouped_experts is grouped
    told = describe_layers(choice, config.model, grouped)
    assert ("experts in torch's grouped products" in told) is grouped
    alone = bool(overrides) and not grouped and not choice.transformer_engine
    assert ("experts one after another" in told) is alone


@pytest.mark.parametrize(("major", "there"), [(8, False), (9, True), (10, True), (12, False)])
def test_grouped_products_are_where_torch_has_a_kernel(
    major: int, there: bool, no_packages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert resolve_layers(model(), CUDA).grouped_products is there
    assert not resolve_layers(model(), CPU).grouped_products


def test_fusions() -> None:
    assert not any(
        value for name, value in fusions(LOCAL, model()).items() if name.endswith("fusion")
    )
    engine = LayerChoice(True, "", on_cuda=True)
    dense, experts = model(), model("model.moe.num_experts=4")
    assert fusions(engine, dense)["apply_rope_fusion"]
    assert not fusions(engine, dense)["moe_grouped_gemm"]
    assert fusions(engine, experts)["moe_grouped_gemm"]
    assert "fp8" not in fusions(engine, dense)
    assert fusions(engine, model("model.fp8=blockwise"))["fp8_recipe"] == "blockwise"


class Fused:
    """Stands in for a norm and a linear layer in one."""


@pytest.mark.parametrize("has_experts", [False, True])
def test_a_fused_norm_keeps_its_name_in_checkpoints(has_experts: bool) -> None:
    modules = LayerModules(RMSNorm, RMSNorm, torch.nn.Linear, torch.nn.Linear, Fused, None)
    layer = layer_spec(LayerKind.SPARSE, has_experts, modules).submodules
    assert layer.input_layernorm is IdentityOp
    assert layer.self_attention.submodules.linear_qkv is Fused
    names = layer.sharded_state_dict_keys_map
    assert names["self_attention.linear_qkv.linear.layer_norm_"] == "input_layernorm."
    # A router reads what the norm makes, so that one stays a layer of its own.
    assert (layer.pre_mlp_layernorm is RMSNorm) == has_experts
    assert ("mlp.linear_fc1.layer_norm_" in names) == (not has_experts)


def test_local_layers_have_their_norms_beside_them() -> None:
    layer = layer_spec(LayerKind.FULL, False, LayerModules.of(LOCAL)).submodules
    assert layer.input_layernorm is layer.pre_mlp_layernorm is RMSNorm
    assert layer.sharded_state_dict_keys_map == {}
    assert isinstance(LayerModules.of(LOCAL).expert_linears, MLPSubmodules)


class WithScales(torch.nn.Linear):
    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(1)

    def set_extra_state(self, state: torch.Tensor) -> None:
        raise AssertionError("nothing was stored")


def test_checkpoints_hold_weights_alone() -> None:
    module = WithScales(2, 3, bias=False)
    _load_weights(module, {"weight": torch.ones(3, 2)})
    assert bool((module.weight == 1).all())
    with pytest.raises(CheckpointError, match=r"lacks \['weight'\]"):
        _load_weights(module, {})
    with pytest.raises(CheckpointError, match=r"too many is \['other'\]"):
        _load_weights(module, {"weight": torch.ones(3, 2), "other": torch.ones(1)})


def test_ranks_that_share_a_group_need_a_process_group() -> None:
    config = compose(["model=tiny_hysparse", "model.num_query_groups=2"])
    groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: 4), kv_sharing=None)
    with pytest.raises(ValueError, match="2 tensor-parallel ranks share a KV group"):
        GroupedProjection(make_megatron_config(config), torch.nn.Linear, (), groups)
