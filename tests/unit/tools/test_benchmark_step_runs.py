"""The step benchmark runs: on the CPU, split over ranks, and where a case fails."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hysparse_kernels.benchmarking.selections import Captured
from measured_steps import MINI, answered

from hysparse_megatron.config.compose import compose
from hysparse_megatron.errors import ConfigError
from tests.captured import Call
from tools.benchmark_step import main
from tools.step_benchmark import child, request
from tools.step_benchmark.options import parse
from tools.step_benchmark.request import Request
from tools.step_benchmark.trace import (
    ELEMENTWISE,
    EXPERTS,
    FULL_ATTENTION,
    GEMM,
    LOSS,
    OPTIMIZER,
    SPARSE_ATTENTION,
)

pytestmark = pytest.mark.thorough


def test_a_case_without_memory_becomes_a_note_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, call: Call, tmp_path: Path
) -> None:
    asked: list[Request] = []

    def run(one: Request) -> dict[str, Any]:
        asked.append(one)
        if len(asked) != 1:
            return answered([0.5])

        def out_of_memory(_request: Request) -> dict[str, Any]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore.")

        with monkeypatch.context() as patch:
            patch.setattr(child, "measure", out_of_memory)
            return child.answer(one)

    monkeypatch.setattr(request, "run", run)
    path = tmp_path / "new" / "steps.txt"
    printed = call(main, [*MINI.split(), "--reference", "megatron", "--output", str(path)]).out
    assert path.read_text() == printed
    assert "out of memory: CUDA out of memory. Tried to allocate 9 GiB." in printed
    assert "swa / hysparse [64] 1.00" in printed
    assert "full / hysparse" not in printed
    values = json.loads(path.with_suffix(".json").read_text())
    assert [row["layout"] for row in values["rows"]] == [
        "full",
        "swa",
        "hysparse",
        "megatron",
        "full again",
    ]
    assert values["rows"][0]["note"].startswith("out of memory")
    assert "median_seconds" not in values["rows"][0]
    assert values["rows"][1]["median_seconds"] == 0.5
    assert [one.reference for one in asked] == [False, False, False, True, False]
    assert [one.profile for one in asked] == [True, True, True, True, False]


def test_what_does_not_start_in_time_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(request, "run", lambda one: answered([0.5]))
    assert main([*MINI.split(), "--limit-seconds", "0"]) == 1
    assert capsys.readouterr().out.count("left out after --limit-seconds") == 4


def test_a_process_that_dies_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert request.run(Request("", "cpu")) == {"note": "ended with exit code 1: no message"}


def test_what_a_failing_process_said_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho first >&2\necho last >&2\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert request.run(Request("", "cpu")) == {"note": "ended with exit code -9: last"}
    assert capsys.readouterr().err == "first\nlast\n"


def test_refusals_and_failures_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert child.answer(Request("name: 3\nmodell: {}\n", "cpu"))["note"].startswith("refused: ")
    monkeypatch.setattr(child, "measure", lambda one: 1 / 0)
    note = child.answer(Request("", "cpu"))["note"]
    assert note == "failed: ZeroDivisionError: division by zero"


@pytest.mark.usefixtures("forks_for_commands")
def test_real_steps_on_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "steps.txt"
    arguments = f"{MINI} --layers 3 --layouts full,hysparse --reference megatron --no-repeat"
    assert main([*arguments.split(), "--steps", "2", "--warmup", "1", "--output", str(path)]) == 0
    values = json.loads(path.with_suffix(".json").read_text())
    rows = {row["layout"]: row for row in values["rows"]}
    assert [row["layers"] for row in values["rows"]] == ["3*F", "F 2*S", "3*F"]
    for name, row in rows.items():
        assert row["note"] == "", name
        measured = row["measured"]
        assert len(measured["step_seconds"]) == 2
        assert len(measured["losses"]) == 1 + 2
        assert measured["num_parameters"] == row["parameters"], name
        assert abs(measured["losses"][0] - 5.55) < 0.3  # nothing learnt: the log of 256
        families = measured["profile"]["families"]
        for family in (FULL_ATTENTION, GEMM, EXPERTS, ELEMENTWISE, OPTIMIZER, LOSS):
            assert families[family] > 0, (name, family)
        assert (SPARSE_ATTENTION in families) == (name == "hysparse")
    # Forward and backward: most of a layer's attention is found, though it is made of products.
    hysparse = rows["hysparse"]["measured"]["profile"]["families"]
    assert hysparse[SPARSE_ATTENTION] > 0.5 * hysparse[FULL_ATTENTION]
    assert "Megatron" not in rows["full"]["measured"]["attention"]
    assert rows["megatron"]["measured"]["attention"] == "megatron-core's GPTModel, local layers"
    ratios = [target["text"] for target in values["targets"]]
    assert ratios == ["full / hysparse [64]", "megatron / full [64]"]
    assert "full / hysparse [64]" in path.read_text()


@pytest.mark.usefixtures("forks_for_commands")
def test_real_curves_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "curve.txt"
    arguments = "--layers 4 --vocab 256 --lengths 128 --compare-cpu 6"
    assert main([*arguments.split(), "--device", "cpu", "--output", str(path)]) == 0
    values = json.loads(path.with_suffix(".json").read_text())
    exact, rounded = values["curve"]["cpu reference fp32"], values["curve"]["cpu reference bf16"]
    assert len(exact) == len(rounded) == 6
    assert exact[-1] < exact[0] - 0.3  # one batch over and over is learnt
    [difference] = values["differences"].values()
    assert difference == max(abs(a - b) for a, b in zip(exact, rounded, strict=True))
    assert 0 < difference < 0.05
    assert f"{difference:.2e}" in capsys.readouterr().out


@pytest.mark.usefixtures("forks_for_commands")
def test_other_selections_reach_the_sparse_layers_alone(tmp_path: Path, call: Call) -> None:
    model = compose(["model=hysparse_80b_a3b_mini"]).model
    facts = {"sequence": 64, "block_size": model.block_size}
    facts["num_selected"] = model.num_selected_blocks
    nothing = torch.full((1, 64, model.num_selected_blocks), -1, dtype=torch.int32)
    file = tmp_path / "captured.npz"
    Captured(facts, {0: nothing}).save(file)
    losses = {}
    for picks in ("model", "clustered", str(file)):
        path = tmp_path / f"{len(losses)}.txt"
        arguments = f"{MINI} --layers 3 --layouts full,hysparse --no-repeat --no-profile"
        more = ["--steps", "1", "--warmup", "1", "--picks", picks, "--output", str(path)]
        assert main([*arguments.split(), *more]) == 0
        rows = json.loads(path.with_suffix(".json").read_text())["rows"]
        losses[picks] = {row["layout"]: row["measured"]["losses"] for row in rows}
    assert len({tuple(found["full"]) for found in losses.values()}) == 1
    assert len({tuple(found["hysparse"]) for found in losses.values()}) == 3

    Captured({**facts, "sequence": 128}, {0: nothing}).save(file)
    arguments = f"{MINI} --layers 3 --layouts hysparse --picks {file}"
    assert "'sequence': 128" in call(main, arguments.split(), code=1).out
    assert main([*MINI.split(), "--picks", "clusterd"]) == 2


def test_a_case_is_split_over_ranks(tmp_path: Path, call: Call) -> None:
    arguments = f"{MINI} --layers 3 --layouts hysparse --splits 1,cp2,cp2-layerwise --steps 2"
    output = tmp_path / "rows.txt"
    more = ["--no-profile", "--no-repeat", "--output", str(output), "--set", "model.layout=F 2*S"]
    printed = call(main, [*arguments.split(), *more]).out
    assert "hysparse cp2 / one device, tokens a second, planned " in printed
    assert "hysparse cp2-layerwise / hysparse cp2 [" in printed
    assert "hysparse cp2-layerwise / one device" not in printed
    one, *others = json.loads(output.with_suffix(".json").read_text())["rows"]
    for row in others:
        assert row["measured"]["losses"] == pytest.approx(one["measured"]["losses"], rel=1e-2)
    with pytest.raises(ConfigError, match="run on one device"):
        parse([*arguments.split(), "--reference", "megatron"])
