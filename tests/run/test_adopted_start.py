"""What is adopted is a run directory to tools: its layers are chosen, it is evaluated."""

import json
import math
import random
import shutil
import string
from pathlib import Path

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from transformers import LlamaConfig, LlamaForCausalLM

from hysparse_megatron.config.frozen import load_frozen
from hysparse_megatron.config.schema import Precision
from hysparse_megatron.data.tokenizer import bytes_tokenizer, train_tokenizer
from tests.captured import Call
from tests.unit.model.tiny_models import randomize
from tools import choose_full_layers, convert, evaluate, generate, prepare_data

pytestmark = pytest.mark.thorough

IDS, LENGTH, LAYERS = 300, 64, 4
NOISE = 3e-3
"""In nats. A random model is badly conditioned: rounding moves its loss by 1e-5, now and then by
4e-4; another layer that sees everything, by some 1e-2."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, session_seed: int) -> Path:
    """A random Llama with a tokenizer of bytes."""
    torch.manual_seed(session_seed)
    folder = tmp_path_factory.mktemp("llama")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=IDS, hidden_size=32, intermediate_size=40, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        )
    )  # fmt: skip
    randomize(model)
    model.save_pretrained(folder)
    bytes_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, session_seed: int) -> Path:
    draw = random.Random(session_seed)
    folder = tmp_path_factory.mktemp("text")
    for number in range(200):
        (folder / f"{number}.txt").write_text("".join(draw.choices(string.printable, k=500)))
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where prepared data are cached."""
    monkeypatch.chdir(tmp_path)


def adopt(original: Path, folder: Path, layout: str, *options: str) -> Path:
    assert convert.main(["adopt", str(original), str(folder), "--layout", layout, *options]) == 0
    return folder


def test_layers_are_chosen_and_the_layout_adopted(
    original: Path, text: Path, tmp_path: Path, call: Call
) -> None:
    windows = adopt(original, tmp_path / "windows", f"{LAYERS}*W", "--window", "3")
    shared = ["--data", str(text), "--sequences", "16"]
    chosen = tmp_path / "layers.json"
    choose = ["--run-dir", str(windows), "--count", "2", "--json", str(chosen), *shared]
    told = call(choose_full_layers.main, choose).out
    found = json.loads(chosen.read_text())
    [choice] = found["choices"]
    assert choice["losses"].keys() == {"1", "2", "3"}
    assert f'--layout "{found["layout"]}"' in told
    assert f"layer {choice['layer']:>3} full too: {min(choice['losses'].values()):.4f}" in told

    # The same losses of the model with all layers full, and of one with windows beside the two.
    def loss_of(name: str, layout: str) -> float:
        start = adopt(original, tmp_path / name, layout, "--window", "3")
        scores = tmp_path / f"{name}.json"
        arguments = ["--run-dir", str(start), "--json", str(scores), *shared]
        assert evaluate.main(arguments) == 0
        return json.loads(scores.read_text())["loss"][0]["all"]["loss"]

    assert found["full"] == pytest.approx(loss_of("full", f"{LAYERS}*F"), abs=NOISE)
    letters = "".join("F" if n in (0, choice["layer"]) else "W" for n in range(LAYERS))
    best = min(choice["losses"].values())
    assert best == pytest.approx(loss_of("two", letters), abs=NOISE)
    assert math.isfinite(found["first_alone"])


def test_it_speaks_and_is_exported(original: Path, tmp_path: Path, call: Call) -> None:
    start = adopt(original, tmp_path / "start", "F 2*S F", "--window", "4", "--block-size", "4")
    arguments = ["--prompt", "some words", "--max-new-tokens", "5", "--ignore-end"]
    assert "decode: 4 tokens" in call(generate.main, ["--run-dir", str(start), *arguments]).err
    assert convert.main(["export", "--run-dir", str(start), str(tmp_path / "exported")]) == 0
    described = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert described["suppress_tokens"][0] == 257  # those that the tokenizer does not have


def test_it_may_be_moved(
    original: Path, text: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings name the tokenizer where it was; the folder has one itself."""
    adopt(original, Path("start"), "4*W").rename(tmp_path / "moved")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    start = ["--run-dir", str(tmp_path / "moved")]
    assert generate.main([*start, "--prompt", "a", "--max-new-tokens", "2"]) == 0
    assert evaluate.main([*start, "--data", str(text), "--sequences", "2"]) == 0
    choose = [*start, "--count", "1", "--data", str(text)]
    assert '--layout "F 3*S"' in call(choose_full_layers.main, choose).out
    assert convert.main(["export", *start, "exported"]) == 0


def test_without_a_tokenizer_text_is_refused(
    original: Path, text: Path, capsys: pytest.CaptureFixture[str], call: Call
) -> None:
    shutil.copytree(original, "bare")
    Path("bare", "tokenizer.json").unlink()
    start = ["--run-dir", str(adopt(Path("bare"), Path("start"), "4*W"))]
    assert "WARNING: bare has no tokenizer.json" in capsys.readouterr().out
    for tool, options in (
        (evaluate, []),
        (evaluate, ["--data", str(text)]),
        (choose_full_layers, ["--count", "2", "--data", str(text)]),
    ):
        told = call(tool.main, [*start, *options], code=5).err
        assert "step-00000000 does not say its tokenizer" in told
    prompt = ["--prompt", "a", "--max-new-tokens", "2"]
    told = call(generate.main, [*start, *prompt], code=5).err
    assert "name its file with --tokenizer" in told
    assert generate.main([*start, *prompt, "--tokenizer", str(original)]) == 0


def test_data_of_another_model_are_refused(
    original: Path, text: Path, tmp_path: Path, call: Call
) -> None:
    texts = [path.read_text() for path in text.iterdir()]
    train_tokenizer(texts, 290).save("tokenizer.json")
    prepare = ["--tokenizer", "tokenizer.json", "--output", "prepared", "--quiet", str(text)]
    assert prepare_data.main([*prepare, "--validation-fraction", "0.2"]) == 0
    start = adopt(original, tmp_path / "start", "4*W")
    told = call(evaluate.main, ["--run-dir", str(start), "--data", "prepared"], code=5).err
    assert "prepared: prepared with another tokenizer" in told


def test_weights_in_bf16_are_trained_and_read_so(original: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(original).bfloat16().save_pretrained(tmp_path / "low")
    shutil.copy(original / "tokenizer.json", tmp_path / "low")
    start = adopt(tmp_path / "low", tmp_path / "start", "4*W")
    assert load_frozen(start / "config.yaml").train.precision is Precision.bf16
    experiment = yaml.safe_load((start / "experiment.yaml").read_text())
    assert experiment["train"] == {"precision": "bf16"}
    high = adopt(original, tmp_path / "high", "4*W")
    assert load_frozen(high / "config.yaml").train.precision is Precision.fp32
    prompt = ["--prompt", "a", "--max-new-tokens", "2"]
    assert generate.main(["--run-dir", str(start), *prompt]) == 0


@pytest.mark.parametrize(
    ("layout", "options", "code", "said"),
    [
        ("4*F", ["--count", "2"], 2, "kind F; allowed is W alone"),
        ("4*W", ["--count", "5"], 2, "--count: got 5; allowed at most the 4 layers"),
        ("4*W", ["--count", "2", "--data", "no/such/text"], 5, "no/such/text"),
        ("4*W", ["--count", "2", "--json", "no/such/folder/x"], 2, "--json: cannot write"),
        ("4*W", ["--count", "2", "--json", "/dev/full"], 6, "--json: cannot write /dev/full"),
    ],
)
def test_mistakes(
    layout: str, options: list[str], code: int, said: str, original: Path, text: Path, call: Call
) -> None:
    start = adopt(original, Path("start"), layout)
    arguments = ["--run-dir", str(start), "--data", str(text), *options]
    assert said in call(choose_full_layers.main, arguments, code=code).err
