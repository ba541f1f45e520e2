"""The table of docs/long_context.md says what the planner says, and names every preset."""

import json
import re
from pathlib import Path

import pytest

from hysparse_megatron.config.compose import compose
from hysparse_megatron.plan.memory import GIB
from hysparse_megatron.plan.offload import HOST_BANDWIDTH_GB
from hysparse_megatron.plan.overview import Overview, make_overview
from hysparse_megatron.plan.suggest import overview_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "long_context.md").read_text(encoding="utf-8")
ROWS = re.findall(
    r"^\| `(\w+)` \| (\d+) \| ([\d,]+) \| (\d+) \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GiB \|$",
    PAGE,
    flags=re.M,
)


def test_all_presets_are_there() -> None:
    presets = {path.stem for path in (ROOT / "conf" / "experiment").glob("long_*.yaml")}
    assert {row[0] for row in ROWS} == presets


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_rows_are_what_the_planner_says(row: tuple[str, ...]) -> None:
    name, gpus, tokens, cp, ours, full, memory = row
    config = compose([f"experiment={name}"])
    assert f"{config.train.seq_length:,}" == tokens
    assert str(config.parallel.cp) == cp
    planned = overview_of(config, int(gpus))
    size = "80b_a3b" if "80b" in name else "7b"
    baseline = overview_of(compose([f"experiment={name}", f"model=full_{size}"]), int(gpus))

    def sent(overview: Overview) -> str:
        return f"{max(rank.traffic.context_bytes for rank in overview.ranks) / 1e9:.3g}"

    assert (sent(planned), sent(baseline)) == (ours, full)
    assert f"{planned.peak_bytes / GIB:.1f}" == memory


def test_measured_rows_are_those_of_the_logs() -> None:
    folder = ROOT / "tools" / "step_benchmark" / "results"
    for size, slices in (("80b", "80B-A3B, 12 layers, 16 experts"), ("7b", "7B, 8 layers")):
        log = json.loads((folder / f"2026-11-30-h200x2-cp_{size}_128k.json").read_text())
        found = {row["layout"]: row for row in log["rows"]}
        for layout, words in (("hysparse", "HySparse"), ("full", "all full")):
            one, two = found[layout]["median_seconds"], found[f"{layout} cp2"]["median_seconds"]
            full = found["full cp2"]["median_seconds"]
            peak = found[f"{layout} cp2"]["measured"]["memory"]["peak_allocated"] / GIB
            numbers = f"{one:.2f} s | {two:.2f} s | {one / two:.2f} | {full / two:.2f}"
            assert f"| {slices} | {words} | {numbers} | {peak:.1f} GiB |" in PAGE


def test_one_gpu_is_what_the_log_says() -> None:
    folder = ROOT / "tools" / "step_benchmark" / "results"
    log = json.loads((folder / "2026-12-01-h200-7b_131k.json").read_text())
    for row in log["rows"]:
        peak = row["measured"]["memory"]["peak_allocated"] / GIB
        planned = row["planned_bytes"]["total"] - row["planned_bytes"]["runtime"]
        assert abs(peak / (planned / GIB) - 1) < 0.05
        text = " ".join(PAGE.split())
        assert f"{row['median_seconds']:.2f} s" in text
        assert f"{peak:.1f} GiB" in text
        assert f"{planned / GIB:.1f} planned" in text


def test_short_steps_are_what_the_logs_say() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    folder = ROOT / "tools" / "step_benchmark" / "results"
    for picks in ("random", "trained"):
        log = json.loads((folder / f"2026-12-01-h200-7b_8k_{picks}.json").read_text())
        full, ours = (row["median_seconds"] for row in log["rows"])
        numbers = f"{1e3 * full:.1f} ms | {1e3 * ours:.1f} ms | {full / ours:.2f} |"
        assert f"| {picks} | {numbers}" in page
    folder = ROOT / "kernels" / "benchmarks" / "results"

    def faster(name: str) -> list[str]:
        log = json.loads((folder / f"2026-12-01-h200-{name}.json").read_text())
        targets = [row for row in log["targets"] if "12 layers" in row["text"]]
        return [f"{row['value']:.2f}" for row in targets]

    first, *trained = faster("8k_block")
    assert f"| 32 in 8 groups | {first} | {', '.join(trained)} |" in page
    assert f"| 64 in 4 groups | {faster('8k_block_64_4')[-1]} | |" in page


def test_steps_without_transformer_engine_are_what_the_log_says() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    folder = ROOT / "tools" / "step_benchmark" / "results"
    log = (folder / "2026-12-01-h200-92m_8k.txt").read_text(encoding="utf-8")
    full, hysparse, rotation, *compiled = re.findall(r"median ([\d,]+) tokens/s", log)
    assert f"| plain operations | {full} | {rotation} | {hysparse} |" in page
    assert f"| all compiled | {compiled[0]} | | {compiled[1]} |" in page


KEPT = re.findall(r"^\| (none|`full`|`\[.*\]`) \| ([\d,]+) \| ([\d.]+) \|$", PAGE, flags=re.M)


@pytest.mark.parametrize("row", KEPT, ids=lambda row: row[0])
def test_bytes_that_layers_keep_are_those_of_the_planner(row: tuple[str, str, str]) -> None:
    """Of a layer on average, and how long copies take beside its forward pass without attention."""
    chosen, kept, ratio = row[0].strip("`"), row[1], row[2]
    parts = [f"train.recompute_modules={chosen}"] if "[" in chosen else []
    way = "selective" if parts else chosen
    sizes = ["model=hysparse_7b", "cluster=h200", "train.precision=bf16", "train.seq_length=8192"]
    config = compose([*sizes, "train.micro_batch_size=1", f"train.recompute={way}", *parts])
    overview = make_overview(config, 1)
    layers = overview.plan.layout.num_layers
    bytes_of_layer = overview.ranks[0].memory.activation_bytes / layers / config.train.seq_length
    assert f"{bytes_of_layer:,.0f}" == kept
    computing = overview.flops.linear / layers / 400e12
    assert f"{bytes_of_layer / (HOST_BANDWIDTH_GB * 1e9) / computing:.1f}" == ratio


def test_all_ways_to_recompute_are_in_the_table() -> None:
    assert len(KEPT) == 4
