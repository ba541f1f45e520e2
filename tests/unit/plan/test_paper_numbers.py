"""The planner against every number that the papers publish or that follows from them."""

from dataclasses import replace

import pytest

from hysparse_megatron.architecture.kv_cache import all_full, hybrid_window, kv_cache_bytes
from hysparse_megatron.architecture.layers import Branch, GateKind, LayerKind, mean_keys_seen
from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.architecture.model import ModelConfig
from hysparse_megatron.architecture.parameters import count_parameters
from hysparse_megatron.config.compose import compose
from hysparse_megatron.plan.flops import forward_flops

MILLION = 2**20
HYBRID_SWA_9_FULL = "8*(F 5*W) F"
"""The sliding-window baseline of HySparse2's comparison (arXiv 2609.26368): 9 full layers of 49."""


def model(name: str, *overrides: str) -> ModelConfig:
    return compose([f"model={name}", *overrides]).model


def kinds(layout: str) -> tuple[LayerKind, ...]:
    return tuple(layer.kind for layer in parse_layout(layout).layers)


# Key-value cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "gigabytes"), [(HYBRID_SWA_9_FULL, 12.086), ("4*(F 11*S) F", 6.718)]
)
def test_cache_of_hysparse2s_comparison(layout: str, gigabytes: float) -> None:
    """FP8, 2^20 tokens, heads of 192 / 128: arXiv 2609.26368 prints 12.09 and 6.72 GB."""
    wide = model("hysparse_80b_a3b", "model.head_dim=192")
    assert (wide.head_dim, wide.value_dim) == (192, 128)
    cached = kv_cache_bytes(wide, kinds(layout), MILLION, bytes_per_number=1)
    assert round(cached / 1e9, 3) == gigabytes


@pytest.mark.parametrize(
    ("context", "factor", "digits"),
    [(8192, 8.6, 1), (16384, 9.2, 1), (32768, 9.47, 2), (131072, 9.72, 2), (MILLION, 9.79, 2)],
)
def test_cache_of_the_80b_against_full_attention(context: int, factor: float, digits: int) -> None:
    ours = model("hysparse_80b_a3b")
    layout = kinds(ours.layout)
    ratio = kv_cache_bytes(ours, all_full(layout), context) / kv_cache_bytes(ours, layout, context)
    assert round(ratio, digits) == factor


def test_cache_of_the_7b_against_full_attention() -> None:
    ours = model("hysparse_7b")
    layout = kinds(ours.layout)
    for context, factor in ((8192, 3.46), (32768, 3.56)):
        whole = kv_cache_bytes(ours, all_full(layout), context)
        assert round(whole / kv_cache_bytes(ours, layout, context), 2) == factor


def test_hysparse_and_its_window_baseline_cache_the_same() -> None:
    for name in ("7b", "80b_a3b"):
        ours = model(f"hysparse_{name}")
        layout = kinds(ours.layout)
        assert hybrid_window(layout) == kinds(model(f"hybrid_swa_{name}").layout)
        for context in (64, 128, 129, 8192):
            ratio = kv_cache_bytes(ours, layout, context)
            assert ratio == kv_cache_bytes(ours, hybrid_window(layout), context)


def test_a_context_inside_the_window_is_cached_whole() -> None:
    ours = model("hysparse_7b")
    layout = kinds(ours.layout)
    assert kv_cache_bytes(ours, layout, 100) == kv_cache_bytes(ours, all_full(layout), 100)


# FLOPs -------------------------------------------------------------------------------------------

FLOPS = [
    # gate, shared experts of width 512, output counted, hybrid SWA, HySparse: GFLOPs per token
    (GateKind.head, 0, False, 200.5, 116.5),
    (GateKind.head, 1, True, 201.4, 117.4),
    (GateKind.channel, 0, False, 201.8, 119.4),
]


@pytest.mark.parametrize(("gate", "shared", "with_output", "swa", "hysparse"), FLOPS)
def test_prefill_flops_of_hysparse2s_comparison(
    gate: GateKind, shared: int, with_output: bool, swa: float, hysparse: float
) -> None:
    """Per prompt token at 2^20 tokens, 192 / 128; arXiv 2609.26368, Figure 1 and section 1."""
    wide = model("hysparse_80b_a3b", "model.head_dim=192")
    wide = replace(
        wide, gate=gate, moe=replace(wide.moe, shared_expert_ffn_hidden_size=shared * 512)
    )
    for layout, expected in ((HYBRID_SWA_9_FULL, swa), ("4*(F 11*S) F", hysparse)):
        if gate is GateKind.channel and "W" in layout:
            continue  # that row gates the windows too, which no layer of ours does
        flops = forward_flops(wide, kinds(layout), MILLION)
        total = flops.total if with_output else flops.total - flops.output
        assert total / 1e9 == pytest.approx(expected, rel=0.01)


def test_attention_flops_of_hysparse2s_comparison() -> None:
    """21.47 GFLOPs per full layer and token; nine and five of them."""
    wide = model("hysparse_80b_a3b", "model.head_dim=192")
    for layout, full in ((HYBRID_SWA_9_FULL, 193.3), ("4*(F 11*S) F", 107.4)):
        flops = forward_flops(wide, kinds(layout), MILLION)
        assert flops.branches[Branch.FULL] / 1e9 == pytest.approx(full, rel=1e-3)


def test_keys_seen_are_counted_one_by_one() -> None:
    for length in (1, 2, 7, 50):
        for limit in (None, 1, 3, 7, 49, 50, 80):
            seen = [min(position, limit or length) for position in range(1, length + 1)]
            assert mean_keys_seen(length, limit) == pytest.approx(sum(seen) / length)


def test_short_contexts_see_less_than_the_window() -> None:
    ours = model("hysparse_7b")
    layout = kinds(ours.layout)
    flops = forward_flops(ours, layout, 100)
    per_layer = flops.branches[Branch.FULL] / 10
    assert flops.branches[Branch.WINDOW] == pytest.approx(26 * per_layer)
    assert flops.branches[Branch.SELECTED] == pytest.approx(26 * per_layer)


# Parameters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["hysparse", "full", "hybrid_swa"])
@pytest.mark.parametrize("head_dim", [128, 192])
def test_models_are_as_large_as_their_names(family: str, head_dim: int) -> None:
    wide = f"model.head_dim={head_dim}"
    dense = model(f"{family}_7b", wide)
    counted = count_parameters(dense, kinds(dense.layout))
    assert 7.0e9 < counted.total < 8.5e9
    assert counted.active == counted.total
    sparse = model(f"{family}_80b_a3b", wide)
    counted = count_parameters(sparse, kinds(sparse.layout))
    assert 79e9 < counted.total < 82.5e9
    without_embedding = counted.active - counted.embedding
    assert 3.0e9 < without_embedding < 4.0e9


def test_per_channel_gates_would_be_no_a3b() -> None:
    """The argument for one gate per head: per channel the 80B would have 4.8B active."""
    ours = model("hysparse_80b_a3b", "model.gate=channel")
    counted = count_parameters(ours, kinds(ours.layout))
    assert (counted.active - counted.embedding) / 1e9 == pytest.approx(4.8, abs=0.1)


def test_baselines_differ_in_the_layout_alone() -> None:
    for size in ("7b", "80b_a3b", "7b_mini", "80b_a3b_mini"):
        ours = model(f"hysparse_{size}")
        for family in ("full", "hybrid_swa"):
            theirs = model(f"{family}_{size}")
            changed = replace(ours, layout=theirs.layout)
            if family == "full" and "80b" in size:
                assert theirs.full_gate is not ours.full_gate
                changed = replace(changed, full_gate=theirs.full_gate)
            assert changed == theirs
            assert len(kinds(theirs.layout)) == len(kinds(ours.layout))


def test_layouts_are_the_papers() -> None:
    large = kinds(model("hysparse_80b_a3b").layout)
    assert [index for index, kind in enumerate(large) if kind is LayerKind.FULL] == [
        0,
        12,
        24,
        36,
        48,
    ]
    assert len(large) == 49
    small = kinds(model("hysparse_7b").layout)
    assert (len(small), small.count(LayerKind.FULL)) == (36, 10)
    assert small[-1] is LayerKind.FULL


@pytest.mark.thorough
def test_minis_keep_layout_and_heads_per_group() -> None:
    for family in ("hysparse", "full", "hybrid_swa"):
        for size in ("7b", "80b_a3b"):
            whole, mini = model(f"{family}_{size}"), model(f"{family}_{size}_mini")
            assert mini.layout == whole.layout
            assert mini.full_gate is whole.full_gate
            for one, other in ((whole, mini),):
                ratio = one.num_attention_heads / one.num_query_groups
                assert ratio == other.num_attention_heads / other.num_query_groups
                width = one.num_attention_heads * one.head_dim / one.hidden_size
                assert width == other.num_attention_heads * other.head_dim / other.hidden_size
            counted = count_parameters(replace(mini, vocab_size=4096), kinds(mini.layout))
            assert counted.total < 15e6
