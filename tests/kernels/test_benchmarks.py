"""The benchmarks on a CPU: every table, the files they write, what they say without a GPU."""

import functools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import preparation
from benchmarks.__main__ import main
from benchmarks.measure import TABLES
from benchmarks.options import parse
from benchmarks.prefill import Prompt
from benchmarks.rows import BACKWARD, FORWARD, Row, Rows
from benchmarks.targets import MAIN, SHORT, WIDE, targets
from hysparse_kernels.benchmarking import selections, timer
from hysparse_kernels.benchmarking.problem import Inputs, Problem, parse_shape
from hysparse_kernels.benchmarking.timing import Timing

from tests.captured import Call, captured, import_path

pytestmark = pytest.mark.thorough

ON_CPU = ["--device", "cpu", "--backend", "reference", "--quick"]
PROBLEM = Problem(256, 4, 2, 8, 8, block_size=16, num_selected=4)


def test_every_table_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captured = tmp_path / "captured.npz"
    indices = selections.synthetic(PROBLEM, torch.device("cpu"), clustered=True)[0]
    selections.Captured({"block_size": 16}, {3: indices}).save(captured)
    output = tmp_path / "folder" / "results.txt"
    sizes = ["--sequence", "128", "--shapes", "4/2/8/8", "--block-size", "16"]
    sizes += ["--decode-batch", "1", "3", "--prefill-chunk", "48"]
    code = main([*ON_CPU, *sizes, "--captured", str(captured), "--output", str(output)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert output.read_text() == printed
    results = json.loads(output.with_suffix(".json").read_text())
    assert {row["table"] for row in results["rows"]} == set(TABLES)
    timed = [
        row for row in results["rows"] if row["name"] == "hysparse" and row["table"] != "lists"
    ]
    assert all(row["median_ms"] > 0 and row["low_ms"] <= row["high_ms"] for row in timed), timed
    assert {row["selection"] for row in timed} == {None, "random", "clustered", "captured:3"}
    lengths = {row["problem"]["sequence"] for row in timed if row["selection"] == "captured:3"}
    assert lengths == {256}
    steps = {
        (row["name"], row["problem"]["batch"]): row
        for row in results["rows"]
        if row["table"] == "decode"
    }
    assert {batch for _, batch in steps} == {1, 3}
    for batch in (1, 3):
        full, block = steps["sdpa", batch], steps["hysparse", batch]
        assert full["bytes_per_token"] == 128 * 2 * (8 + 8) * 2
        # All blocks of 128 tokens are selected, and the window of as many holds all of them.
        assert block["bytes_per_token"] == full["bytes_per_token"] * (1 + 11 * 2)
        assert steps["full_fp8", batch]["bytes_per_token"] == 128 * 2 * (8 + 8 + 2)
        seconds = full["median_ms"] / 1e3
        assert full["tokens_per_second"] == pytest.approx(batch / seconds)
    prompts = {row["name"]: row for row in results["rows"] if row["table"] == "prefill"}
    assert prompts.keys() == {"one_piece", "hysparse", "fp8", "full_one_piece", "full"}
    for row in prompts.values():
        assert row["tokens_per_second"] == pytest.approx(128 / row["median_ms"] * 1e3)
    times = prompts["hysparse"]["median_ms"] / prompts["one_piece"]["median_ms"]
    (found,) = (
        target["value"]
        for target in results["targets"]
        if target["text"].startswith("prompt in chunks / in one piece")
    )
    assert found == pytest.approx(times)
    refused = {row["name"]: row["note"] for row in results["rows"] if row.get("median_ms") is None}
    assert "needs a CUDA device" in refused["cudnn"]
    assert "needs a CUDA device" in refused["fla"]
    errors = [check["errors"] for check in results["checks"] if check["name"] == "hysparse"]
    assert len(errors) == 6
    assert max(error for found in errors for error in found.values()) < 1e-2


def test_a_prompt_in_chunks_is_one_in_one_piece() -> None:
    """Through all layers of the prefill table: another order of additions, in bf16."""
    inputs = Inputs.random(PROBLEM, torch.device("cpu"), "reference", torch.bfloat16)
    inputs.indices = selections.synthetic(PROBLEM, torch.device("cpu"), clustered=True)
    prompt = Prompt.make(inputs, chunk=100)
    whole, pieces = prompt.in_one_piece(), prompt.with_caches()()
    assert [part.shape[1] for part in pieces.full] == [100, 100, 56]
    alone, of_layer = prompt.full_in_one_piece(), prompt.full_with_cache()()
    full, sparse = torch.cat(pieces.full, 1), torch.cat(pieces.sparse, 1)
    torch.testing.assert_close(full, whole.full[0], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(sparse, whole.sparse[0], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(torch.cat(of_layer, 1), alone, rtol=1e-2, atol=1e-3)
    assert sparse.std() > 0.1


def test_without_a_gpu_it_says_so_and_exits_with_2() -> None:
    environment = {**os.environ, "PYTHONPATH": import_path("kernels"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks"]
    result = captured(command, env=environment, code=2)
    assert result.stderr.startswith("no CUDA device")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (["--only", "oracle,spars"], "spars"),
        (["--shapes", "64/4/128"], "64/4/128"),
        (["--captured-only"], "--captured FILE"),
        (["--prefill-chunk", "0"], "--prefill-chunk"),
    ],
)
def test_a_wrong_option_is_named(options: list[str], wrong: str, call: Call) -> None:
    assert wrong in call(main, options, code=2).err


def test_default_problems_are_those_with_goals() -> None:
    options = parse([])
    assert options is not None
    assert [(p.sequence, p.shape) for p in options.problems] == [
        (32768, "64/4/128/128"),
        (131072, "64/4/128/128"),
        (32768, "64/4/192/128"),
        (32768, "32/8/128/128"),
    ]
    assert [(p.sequence, p.shape) for p in options.prefill_problems] == [(32768, "64/4/192/128")]
    assert [(p.sequence, p.shape, p.batch) for p in options.decode_problems] == [
        (sequence, shape, batch)
        for shape in (MAIN, WIDE)
        for sequence in (8192, 32768, 131072)
        for batch in (1, 16)
    ]


def test_flops_are_counted_as_published() -> None:
    problem = Problem(32768, *parse_shape("64/4/128/128"))
    # 604 TF/s in 29.1 ms; the floor of a 192/128 backward is 72.4 ms at 790 TF/s.
    assert problem.forward_flops(problem.causal_pairs()) / 29.1e9 == pytest.approx(604, rel=0.01)
    wide = Problem(32768, *parse_shape("64/4/192/128"))
    floor = wide.backward_floor_flops(wide.causal_pairs()) / 790e9
    assert floor == pytest.approx(72.4, rel=0.01)
    assert problem.forward_bytes() / 4.3e9 == pytest.approx(0.27, abs=0.01)
    assert problem.backward_bytes() / 4.3e9 == pytest.approx(0.53, abs=0.01)


@pytest.mark.parametrize("clustered", [True, False])
def test_synthetic_selections_are_such_as_an_oracle_makes(clustered: bool, seed: int) -> None:
    ids = selections.synthetic(PROBLEM, torch.device("cpu"), clustered)
    assert ids.shape == (1, 2, 256, 4)
    token = torch.arange(256)[:, None]
    assert ((ids == -1) | (ids * 16 <= token)).all()
    order = torch.where(ids < 0, 999, ids)
    assert ((order[..., 1:] > order[..., :-1]) | (ids[..., 1:] < 0)).all()
    pairs = 0
    for group in ids[0].tolist():
        for t, row in enumerate(group):
            pairs += 2 * sum(1 for j in range(t + 1) if j // 16 in row)
    assert selections.visible_pairs(ids, PROBLEM) == pairs
    for tokens in (4, 8):
        sizes = [
            len({i for row in group[start : start + tokens] for i in row} - {-1})
            for group in ids[0].tolist()
            for start in range(0, 256, tokens)
        ]
        assert selections.mean_union(ids, tokens) == pytest.approx(sum(sizes) / len(sizes))
    if clustered:
        assert selections.hottest_share(ids) == 1.0


def test_captured_selections_survive_a_file(tmp_path: Path, seed: int) -> None:
    ids = selections.synthetic(PROBLEM, torch.device("cpu"), clustered=False)[0]
    path = tmp_path / "selected.npz"
    selections.Captured({"model": "tiny", "block_size": 16}, {0: ids, 4: ids + 1}).save(path)
    loaded = selections.Captured.load(path)
    assert loaded.facts == {"model": "tiny", "block_size": 16}
    assert torch.equal(loaded.layers[0], ids)
    assert torch.equal(loaded.layers[4], ids + 1)
    three = loaded.for_groups(0, 3, torch.device("cpu"))
    assert torch.equal(three[0], ids[[0, 1, 0]])


def test_ratios_and_their_goals() -> None:
    problem = Problem(SHORT, *parse_shape(MAIN))
    rows = Rows()
    for name, step, median in (
        ("cudnn", FORWARD, 10.0),
        ("hysparse", FORWARD, 10.7),
        ("cudnn", BACKWARD, 20.0),
        ("hysparse", BACKWARD, 21.0),
    ):
        rows.add(Row("oracle", problem, None, name, "", step, Timing(median, median, median, 3)))
    lines = [target.line() for target in targets(rows)]
    assert lines == [
        "  oracle forward / cuDNN forward [32768, 64/4/128/128] 1.07 (target 1.10) ok",
        "  oracle backward / cuDNN backward [32768, 64/4/128/128] 1.05 (target 1.03) MISSED",
    ]


def test_what_is_compiled_and_checked_before_timing() -> None:
    options = parse([])
    assert options is not None
    work = preparation.jobs(options.problems, ["oracle", "sparse", "window"], "cuda", "triton")
    compiled = [job for job in work if job.parts]
    checked = [job for job in work if not job.parts]
    assert work == compiled + checked
    lengths = {
        name: sorted({job.problem.sequence for job in compiled if job.peer_name == name})
        for name in ("fla", "flex", "hysparse", "cudnn")
    }
    assert lengths == {"fla": [32768], "flex": [32768, 131072], "hysparse": [4096], "cudnn": []}
    for table in ("oracle", "sparse", "window"):
        ours = [job for job in checked if job.table == table and job.peer_name == "hysparse"]
        assert len(ours) == 6  # an aligned and an odd problem for each of three shapes
        assert {job.problem.heads_per_group for job in ours} == {16, 4}
    odd = [job for job in checked if job.problem.batch == 2 and job.peer_name == "fla"]
    assert [job.shape for job in odd] == [MAIN]


def test_steps_stop_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(timer.time, "perf_counter", lambda: float(next(clock)))
    done: list[int] = []
    step, cpu = functools.partial(done.append, 1), torch.device("cpu")
    assert timer.seconds_of_steps(step, 10, 0.0, cpu) == [1.0, 1.0]
    assert timer.seconds_of_steps(step, 10, 4.0, cpu) == [1.0] * 4
    assert timer.seconds_of_steps(step, 3, 99.0, cpu) == [1.0] * 3
    assert len(done) == 9
