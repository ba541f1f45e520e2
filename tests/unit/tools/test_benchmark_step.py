"""`python -m tools.benchmark_step`: slices, families, tables, ratios, notes, and real steps."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from measured_steps import MINI, answered

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.frozen import to_yaml
from hysparse_megatron.data.read import batches as data_batches
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.plan.memory import GIB
from hysparse_megatron.plan.overview import make_overview
from tests.captured import Call
from tools.benchmark_step import main
from tools.step_benchmark import child, request
from tools.step_benchmark.cases import make_cases
from tools.step_benchmark.options import parse
from tools.step_benchmark.report import family_lines, memory_lines, time_line
from tools.step_benchmark.rows import Row
from tools.step_benchmark.slices import default_layers, slice_layout
from tools.step_benchmark.splits import read_split
from tools.step_benchmark.targets import targets
from tools.step_benchmark.trace import (
    ELEMENTWISE,
    EXPERTS,
    FULL_ATTENTION,
    GEMM,
    LOSS,
    OPTIMIZER,
    OTHER,
    SPARSE_ATTENTION,
    break_down,
    family_of,
)

pytestmark = pytest.mark.thorough

OF_80B, OF_7B = "4*(F 11*S) F", "8*(F 3*S) F 2*S F"
BIG = "--layers 12 --experts 64 --vocab 8192 --set train.recompute=full train.precision=bf16"


@pytest.mark.parametrize(
    ("model", "name", "layers", "expected"),
    [
        (OF_80B, "hysparse", 12, "F 11*S"),
        (OF_80B, "full", 12, "12*F"),
        (OF_80B, "megatron", 12, "12*F"),
        (OF_80B, "swa", 12, "F 11*W"),
        (OF_80B, "hysparse", 13, "F 11*S F"),
        (OF_80B, "hysparse", 6, "F 5*S"),
        (OF_80B, "hysparse", 1, "F"),
        (OF_7B, "hysparse", 12, "3*(F 3*S)"),
        (OF_7B, "swa", 10, "2*(F 3*W) F W"),
        ("4*(F 11*W) F", "hysparse", 24, "2*(F 11*S)"),
    ],
)
def test_slices(model: str, name: str, layers: int, expected: str) -> None:
    assert slice_layout(model, name, layers) == expected


def test_a_slice_has_whole_blocks_by_default() -> None:
    assert [default_layers(layout) for layout in (OF_80B, OF_7B, "F 4*S F")] == [12, 12, 15]
    with pytest.raises(ValueError, match="hybrid block"):
        default_layers("49*F")


def test_cases_differ_in_their_layout_alone() -> None:
    cases = make_cases(parse(f"{BIG} --lengths 4096,32768 --micro-batches 3".split()))
    labels = ["full", "swa", "hysparse", "full again"]
    assert [(case.length, case.label) for case in cases] == [
        (length, label) for length in (4096, 32768) for label in labels
    ]
    whole = compose(["model=hysparse_80b_a3b"]).model
    texts = set()
    for case in cases[:4]:
        config = case.config
        assert (config.model.moe.num_experts, config.model.vocab_size) == (64, 8192)
        assert config.model.moe.num_active_experts == whole.moe.num_active_experts
        for name in ("hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "gate"):
            assert getattr(config.model, name) == getattr(whole, name)
        assert case.tokens == 3 * 4096
        texts.add(to_yaml(config).replace(config.model.layout, "LAYOUT"))
    assert len(texts) == 1


def test_the_users_settings_win() -> None:
    options = parse(f"{BIG} --lengths 4096 --set train.micro_batch_size=2 --no-repeat".split())
    config = make_cases(options)[0].config
    assert (config.train.micro_batch_size, config.train.global_batch_size) == (2, 2)
    assert config.train.recompute.value == "full"


def test_defaults_depend_on_what_is_asked_for() -> None:
    cpu = ["--device", "cpu"]
    options = parse(cpu)
    assert (options.model, options.lengths, options.vocab) == ("hysparse_80b_a3b", [32768], None)
    options = parse([*cpu, "--compare-cpu"])
    found = (options.model, options.lengths, options.vocab, options.compare_cpu)
    assert found == ("tiny_hysparse", [512], 4096, 20)
    options = parse([*cpu, "--compare-cpu", "3", "--model", "hysparse_7b"])
    assert (options.vocab, options.compare_cpu) == (None, 3)


def test_flops_and_memory_are_the_planners() -> None:
    case = make_cases(parse(f"{BIG} --lengths 4096 --layouts hysparse".split()))[0]
    overview = make_overview(case.config, 1)
    assert case.flops_per_token == overview.training_flops_per_token
    # With full recompute, which does all again but the output projection.
    assert case.flops_per_token == 4 * overview.flops.total - overview.flops.output
    assert case.memory == overview.ranks[0].memory
    row = Row(case, answered([0.5]), peak_tflops=1000.0)
    assert row.tokens_per_second == 4096 / 0.5
    assert row.tflops == pytest.approx(case.flops_per_token * 4096 / 0.5 / 1e12)
    assert row.share_of_peak == pytest.approx(row.tflops / 1000)


def test_a_gpu_is_planned_for_as_one() -> None:
    """A CPU fuses no activations and would keep 2.7 GiB more."""
    results = Path(child.__file__).parent / "results"
    log = results / "2026-12-01-h200-7b_8k_trained.json"
    sizes = "--model hysparse_7b --layers 8 --vocab 8192 --lengths 8192 --layouts full,hysparse"
    options = parse(f"{sizes} --no-repeat --set train.recompute=none".split())
    options.device = "cuda"
    for case, row in zip(make_cases(options), json.loads(log.read_text())["rows"], strict=True):
        measured = Row(case, {"memory": row["measured"]["memory"]}, peak_tflops=989.0)
        assert measured.memory_ratio == pytest.approx(1, abs=0.03)


def test_batches_are_those_of_training() -> None:
    overrides = ["train.seq_length=24", "train.micro_batch_size=2", "train.global_batch_size=6"]
    config = compose(["model=hysparse_7b_mini", "model.vocab_size=90", *overrides])
    made = child.random_batch(config, seed=3)
    assert len(made) == 3
    rows = torch.cat([made[0]["tokens"], made[0]["labels"][:, -1:]], dim=1)
    expected = data_batches._to_tensors(rows.numpy())
    assert made[0].keys() == expected.keys()
    for name, tensor in made[0].items():
        assert tensor.dtype == expected[name].dtype, name
        assert tensor.stride() == expected[name].stride(), name
        assert torch.equal(tensor, expected[name]), name
    assert not torch.equal(made[0]["tokens"], made[1]["tokens"])
    assert torch.equal(child.random_batch(config, seed=3)[1]["tokens"], made[1]["tokens"])


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("oracle_kernel", FULL_ATTENTION),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7", FULL_ATTENTION),
        ("forward_kernel", SPARSE_ATTENTION),
        ("dkv_kernel", SPARSE_ATTENTION),
        ("compact_kernel", SPARSE_ATTENTION),
        ("nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_NNT", GEMM),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", GEMM),
        ("aten::mm", GEMM),
        ("void at::native::radixSortKVInPlace<...>", EXPERTS),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>", ELEMENTWISE),
        ("void at::native::(anonymous namespace)::cuComputeGradInput_rms_norm", ELEMENTWISE),
        ("Memcpy HtoD (Pageable -> Device)", ELEMENTWISE),
        ("void at::native::indexSelectLargeIndex<...>", OTHER),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", OTHER),
        ("something_new", OTHER),
    ],
)
def test_kernels_by_their_names(name: str, family: str) -> None:
    assert family_of(name) == family


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def flow(number: int, forward: tuple[int, float], backward: tuple[int, float]) -> list[dict]:
    places = {"s": forward, "f": backward}
    return [
        {"ph": ph, "cat": "fwdbwd", "name": "fwdbwd", "id": number, "tid": tid, "ts": ts}
        for ph, (tid, ts) in places.items()
    ]


def test_kernels_by_the_annotation_that_launched_them() -> None:
    """A backward kernel has its forward's family, on another thread and with any name."""
    events = [
        event("user_annotation", SPARSE_ATTENTION, 10, 20),
        event("cpu_op", "_Attention", 12, 10),
        event("cuda_driver", "cuLaunchKernelEx", 15, 2, correlation=1),
        event("cuda_runtime", "cudaLaunchKernel", 40, 2, correlation=2),
        event("cpu_op", "_AttentionBackward", 50, 10, tid=2),
        event("cuda_driver", "cuLaunchKernelEx", 52, 2, tid=2, correlation=3),
        event("cuda_runtime", "cudaLaunchKernel", 70, 2, tid=2, correlation=4),
        event("user_annotation", OPTIMIZER, 80, 20),
        event("cpu_op", "aten::_foreach_mul_", 85, 10, **{"External id": 77}),
        *flow(9, (1, 12), (2, 50)),
        event("kernel", "forward_kernel", 100, 30, tid=7, correlation=1),
        event("kernel", "nvjet_tst", 130, 50, tid=7, correlation=2),
        event("kernel", "vectorized_elementwise_kernel", 170, 20, tid=8, correlation=3),
        event("kernel", "oracle_kernel", 300, 5, tid=7, correlation=4),
        event("kernel", "multi_tensor_apply", 310, 7, tid=7, **{"External id": 77}),
        event("gpu_memcpy", "Memcpy DtoH", 320, 1, tid=7),
    ]
    found = break_down(events)
    expected = {
        SPARSE_ATTENTION: 30 + 20,
        GEMM: 50,
        FULL_ATTENTION: 5,
        OPTIMIZER: 7,
        ELEMENTWISE: 1,
    }
    assert found.families == pytest.approx({name: time * 1e-6 for name, time in expected.items()})
    # Two kernels overlap by 10 microseconds.
    assert found.busy_seconds == pytest.approx((90 + 5 + 7 + 1) * 1e-6)


def test_operators_count_without_what_they_call() -> None:
    events = [
        event("user_annotation", LOSS, 0, 100),
        event("cpu_op", "aten::sum", 10, 40),
        event("cpu_op", "aten::matmul", 200, 50),
        event("cpu_op", "aten::mm", 205, 40),
        event("cpu_op", "aten::cat", 207, 10),
    ]
    found = break_down(events)
    expected = {LOSS: 100, GEMM: 40, ELEMENTWISE: 10}
    assert found.families == pytest.approx({name: time * 1e-6 for name, time in expected.items()})


def rows_of(arguments: str, seconds: dict[str, list[float]], **more: Any) -> list[Row]:
    cases = make_cases(parse(arguments.split()))
    return [Row(case, answered(seconds[case.label], **more), 989.0) for case in cases]


TIMES = {
    "full": [3.0, 2.9, 3.1],
    "swa": [0.9],
    "hysparse": [1.0],
    "megatron": [3.3],
    "full again": [3.15],
}


def test_ratios_and_goals() -> None:
    rows = rows_of(f"{BIG} --lengths 32768,131072 --reference megatron", TIMES)
    lines = [target.line() for target in targets(rows)]
    for expected in (
        "full / hysparse [32768, 80B-A3B] 3.00 (target at least 2.50) ok",
        "full / hysparse [131072, 80B-A3B] 3.00 (target at least 4.50) MISSED",
        "swa / hysparse [32768, 80B-A3B] 0.90",
        "megatron / full [32768, 80B-A3B] 1.10 (target at least 1.00) ok",
        "drift: full again / full [32768, 80B-A3B] 1.05",
    ):
        assert f"  {expected}" in lines
    dense = "--model hysparse_7b --vocab 8192 --lengths"
    assert [target.limit for target in targets(rows_of(f"{dense} 32768", TIMES))] == [
        1.35,
        None,
        None,
        None,
    ]
    assert all(target.limit is None for target in targets(rows_of(f"{dense} 8192", TIMES)))
    assert all(target.limit is None for target in targets(rows_of(MINI, TIMES)))


def test_tables_hold_what_was_measured() -> None:
    memory = {
        "state": 48 * GIB,
        "peak_allocated": 60 * GIB,
        "peak_reserved": 61 * GIB,
        "device_used": 63 * GIB,
    }
    profile = {
        "families": {FULL_ATTENTION: 1.8, GEMM: 0.6, OPTIMIZER: 0.0},
        "busy_seconds": 2.4,
    }
    row = rows_of(f"{BIG} --lengths 32768", TIMES, memory=memory, profile=profile)[0]
    planned = row.case.memory.total - row.case.memory.runtime
    line = time_line(row)
    ratio = f"{60 * GIB / planned:.2f}"
    share = f"{row.case.flops_per_token * 32768 / 3.0 / 989e12:.1%}"
    for expected in ("12*F", "3000.0 ms", "2950.0 .. 3050.0", "10923", share, "60.0", ratio):
        assert expected in line
    measured = memory_lines([row])[1].split()
    state = row.case.memory.weights + row.case.memory.gradients + row.case.memory.optimizer
    assert measured[4:6] == [f"{state / GIB:.1f}", "48.0"]
    assert measured[-3:] == ["12.0", "61.0", "63.0"]
    families = "\n".join(family_lines([row]))
    for expected in ("1800.0 (75%)", "600.0 (25%)", "idle share of a step", "20%"):
        assert expected in families
    assert OPTIMIZER not in families  # nothing to show
    values = json.loads(json.dumps(row.as_json()))
    assert values["memory_ratio"] == pytest.approx(60 * GIB / planned)
    assert values["planned_bytes"]["total"] == row.case.memory.total


BAD = [
    ("--model nope", "--model"),
    ("--model full_7b", "hybrid block"),
    ("--model tiny_hysparse", "--vocab"),
    ("--layers 0", "--layers"),
    ("--steps many", "--steps"),
    ("--lengths 64,x", "--lengths"),
    ("--layouts full,half", "--layouts"),
    ("--experts 3", "num_active_experts"),
    ("--set recompute", "--set"),
    ("--set model.hiden_size=3", "hiden_size"),
    ("--reference megatron --set model.value_head_dim=4", "one head dim"),
    ("--reference megatron --set model.full_gate=head", "full_gate"),
    ("--output steps.json", "--output"),
    ("--compare-cpu 0", "--compare-cpu"),
    ("--frobnicate", "--frobnicate"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD)
def test_mistakes_end_with_2_before_anything_runs(
    arguments: str, text: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request, "run", lambda one: pytest.fail("something ran"))
    printed = call(main, ["--device", "cpu", *arguments.split()], code=2)
    assert printed.out == ""
    assert text in printed.err
    assert printed.err.startswith("ConfigError: ")


def test_a_path_that_cannot_be_written_is_found_out_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request, "run", lambda one: pytest.fail("something ran"))
    (tmp_path / "file").write_text("")
    assert main([*MINI.split(), "--output", str(tmp_path / "file" / "steps.txt")]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu_where_one_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        parse(["--device", "cuda"])


@pytest.mark.parametrize(
    ("text", "ranks", "overrides"),
    [
        ("1", 1, []),
        ("dp2", 2, []),
        ("cp4", 4, ["parallel.cp=4"]),
        ("dp4-ep4", 4, ["parallel.ep=4"]),
        ("cp2-layerwise", 2, ["parallel.cp=2"]),
        ("dp2-apart", 2, [f"parallel.overlap.{n}=false" for n in ("grad_reduce", "param_gather")]),
        ("tp2-cp4", 8, ["parallel.tp=2", "parallel.cp=4", "parallel.sequence_parallel=true"]),
    ],
)
def test_splits_name_their_settings(text: str, ranks: int, overrides: list[str]) -> None:
    split = read_split(text)
    assert (str(split), split.ranks, split.overrides) == (text, ranks, overrides)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cp",
        "cp1",
        "xp2",
        "cp2-",
        "cp2-cp2",
        "2cp",
        "dp2-layerwise",
        "layerwise",
        "cp2-pp2-layerwise",
    ],
)
def test_other_splits_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="allowed"):
        read_split(text)
