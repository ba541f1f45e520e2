"""`python -m tools.plan`: tables, JSON, suggestions, refusals."""

import json
import os
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import DataConfig
from hysparse_megatron.data.prepare.cached import prepare_corpus
from hysparse_megatron.data.tokenizer import train_tokenizer
from hysparse_megatron.plan.overview import make_overview
from tests.captured import Call, captured
from tests.run.run_commands import children_seconds
from tools.plan import main

ROOT = Path(__file__).resolve().parents[3]
LARGE = [
    "model=hysparse_80b_a3b",
    "cluster=h100",
    "train.precision=bf16",
    "train.seq_length=32768",
    "train.global_batch_size=128",
    "train.micro_batch_size=1",
    "train.recompute=full",
    "parallel.tp=8",
    "parallel.pp=4",
    "parallel.ep=16",
    "parallel.sequence_parallel=true",
    "model.layout=F 11*S F 6*S | 5*S 2*(F 11*S) F",
]


def test_the_80b_in_seconds_without_torch() -> None:
    """The whole command, imports included; torch would take longer than all of it."""
    program = (
        "import sys; from tools.plan import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 99 * ('torch' in sys.modules))"
    )
    start = children_seconds()
    done = captured(
        [sys.executable, "-c", program, "--gpus", "128", *LARGE],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert children_seconds() - start < 10
    for expected in ("81,355,025,920 in total", "in the block of layer 12", "KV cache", "9.47x"):
        assert expected in done.stdout


def test_json_holds_what_the_overview_holds(call: Call) -> None:
    values = json.loads(call(main, ["--gpus", "128", "--json", *LARGE]).out)
    overview = make_overview(compose(LARGE), 128)
    assert values["parameters"]["total"] == overview.parameters.total
    assert values["peak_bytes"] == overview.peak_bytes
    assert sum(stage["num_layers"] for stage in values["stages"]) == 49
    assert values["stages"][0]["cut"] is None
    crossing = [stage["cut"]["oracle"] for stage in values["stages"][1:]]
    assert 12 in crossing
    for rank, own in zip(values["ranks"], overview.ranks, strict=True):
        memory = rank["memory_bytes"]
        parts = sum(size for name, size in memory.items() if name not in ("total", "activations"))
        assert memory["total"] == parts + sum(memory["activations"].values())
        assert memory["total"] == own.memory.total
    cache = {row["context_length"]: row for row in values["kv_cache"]}
    assert round(cache[32768]["full_bytes"] / cache[32768]["bytes"], 2) == 9.47


@pytest.mark.thorough
def test_suggestions(call: Call) -> None:
    free = [item for item in LARGE if not item.startswith(("parallel", "model.layout"))]
    lines = call(main, ["--gpus", "128", "--suggest", "3", *free]).out.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert main(["--gpus", "128", *free, *line.partition("  (")[0].split()]) == 0


def test_the_picture_shows_stages_memory_and_cache(tmp_path: Path, call: Call) -> None:
    path = tmp_path / "plan.svg"
    assert "KV cache" in call(main, ["--gpus", "128", "--plot", str(path), *LARGE]).out
    picture = ElementTree.parse(path).getroot()
    texts = ["".join(element.itertext()) for element in picture.iter() if "text" in element.tag]
    overview = make_overview(compose(LARGE), 128)
    assert [text for text in texts if text.startswith("pp ")] == ["pp 0", "pp 1", "pp 2", "pp 3"]
    layers = [item for item in picture.iter() if item.get("class") == "layer"]
    assert [item.get("data-kind") for item in layers] == list(
        "".join(s.kinds for s in overview.stages)
    )
    # Stacked bars are as high as the memory they stand for.
    for rank, own in enumerate(overview.ranks):
        bars = [item for item in picture.iter() if item.get("data-rank") == str(rank)]
        height = sum(float(item.get("height", 0)) for item in bars)
        limit = next(item for item in picture.iter() if item.get("class") == "limit")
        scale = float(limit.get("data-height", 0)) / (79 * 2**30)
        assert height == pytest.approx(own.memory.total * scale, abs=1)
    curves = [item for item in picture.iter() if item.get("class") == "cache"]
    assert len(curves) == 3
    # Both axes have round values, and the limit its number.
    for value in (
        "at cuts: sent by each rank per micro-batch and direction",
        "20",
        "40",
        "60",
        "limit 79 GiB",
        "1 GB",
        "10 GB",
        "tokens of context",
        "pipeline rank",
        "GiB",
    ):
        assert value in texts, value


def test_the_picture_of_a_small_model_has_no_zeros(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    small = ["model=hysparse_7b_mini", "model.vocab_size=1000"]
    assert main(["--gpus", "1", "--plot", str(path), *small]) == 0
    picture = ElementTree.parse(path).getroot()
    texts = ["".join(element.itertext()) for element in picture.iter() if "text" in element.tag]
    assert re.search(r": [1-9][\d.]*M parameters", " ".join(texts))
    assert any(re.fullmatch(r"10+ [kM]B", text) for text in texts)
    assert not [text for text in texts if re.search(r"\b0\.0", text)]


def test_bars_of_a_small_model_are_not_flat_under_a_large_limit(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    tall = {}
    for cluster, told in (
        ("h100", "limit: 79 GiB, far above"),
        ("this_machine", "limit: not known"),
    ):
        assert main(["--plot", str(path), "experiment=quickstart", f"cluster={cluster}"]) == 0
        picture = ElementTree.parse(path).getroot()
        assert told in "".join(picture.itertext())
        assert not [item for item in picture.iter() if item.get("class") == "limit"]
        bars = [item for item in picture.iter() if item.get("data-rank") == "0"]
        tall[cluster] = sum(float(item.get("height", 0)) for item in bars)
    assert min(tall.values()) > 200


def test_readers_of_dark_pages_have_colours_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    assert main(["--plot", str(path), "experiment=quickstart"]) == 0
    text = path.read_text()
    [rules] = re.findall(r"<style>@media \(prefers-color-scheme:dark\)\{(.*)\}</style>", text)
    changed = dict(re.findall(r'\[(fill|stroke)="(#\w+)"\]', rules))
    assert changed.keys() == {"fill", "stroke"}
    replaced = set(re.findall(r'="(#\w+)"\]', rules))
    shapes = text.replace(rules, "")
    assert {"#1a1a1a", "#ffffff", "#dddddd"} <= replaced & set(re.findall(r'"(#\w+)"', shapes))
    assert 'fill="white"' not in text
    assert not re.findall(r"<text(?![^>]*fill=)", text), "text that stays black"


def head(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_the_vocabulary_is_that_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart = "experiment=quickstart"
    told = head(capsys, quickstart)
    assert "vocabulary: 4,096 token ids (assumed: a tokenizer of data.tokenizer_vocab_size" in told
    assert "parameters: 2,191,792 in total" in told
    assert "4 ranks: tp 2, pp 2" in told, "as many as the plan needs"
    assert "vocabulary: 300 token ids" in head(capsys, quickstart, "data.tokenizer_vocab_size=300")
    assert "2,000 token ids (model.vocab_size)" in head(capsys, quickstart, "model.vocab_size=2000")
    train_tokenizer(["some text"], 257).save(str(tmp_path / "tokenizer.json"))
    told = head(capsys, quickstart, f"data.tokenizer={tmp_path}")
    assert f"vocabulary: 257 token ids (that of {tmp_path})" in told
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "text {n}"}}\n' for n in range(40)))
    text = str(tmp_path / "text.jsonl")
    small = {"tokenizer_vocab_size": 270, "validation_fraction": 0.25}
    corpus = prepare_corpus(DataConfig(path=text, cache_dir=str(tmp_path), **small), 7)
    told = head(capsys, quickstart, f"data.path={corpus.directory}")
    assert f"vocabulary: {corpus.vocab_size:,} token ids (that of {corpus.directory})" in told
    blend = f"data.blend=1.0 {corpus.directory}"
    assert f"(that of {corpus.directory})" in head(capsys, quickstart, blend)
    (tmp_path / "tokenizer.json").write_text("{}")
    told = head(capsys, quickstart, f"data.tokenizer={tmp_path}")
    assert f"4,096 token ids (assumed: {tmp_path}/tokenizer.json: not a tokenizer.json" in told


@pytest.mark.parametrize("cluster", ["this_machine", "slurm_cpu"])
def test_a_machine_of_unknown_speed_is_promised_no_time(
    cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["experiment=quickstart", f"cluster={cluster}"]
    told = head(capsys, *arguments)
    assert "a step: no time planned, cluster.peak_tflops is null" in told
    assert "tokens/s" not in told
    values = json.loads(head(capsys, "--json", *arguments))["step"]
    assert {name for name, value in values.items() if value is not None} == {"bubble_share"}
    assert " s a step" not in head(capsys, "--suggest", "2", *arguments)
    told = head(capsys, *arguments, "cluster.peak_tflops=0.05")
    assert "a step: about " in told
    assert "tokens/s/GPU" in told


BAD = [
    (["--gpus", "128", "--plot", "/nowhere/plan.svg"], "cannot write /nowhere/plan.svg"),
    (["--gpus", "0"], "--gpus"),
    (["--suggest", "-3"], "allowed a whole number from 1"),
    (["--suggest", "3", "--plot", "plan.svg"], "--plot draws one plan"),
    (["parallel.ep=3", "--gpus", "128"], "nearest plans that work"),
    (["modle=tiny"], "modle"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD)
def test_mistakes_end_with_2(arguments: list[str], text: str, call: Call) -> None:
    assert text in call(main, [*LARGE, *arguments], code=2).err
