"""What is adopted is a run directory to tools: its layers are chosen, it is evaluated."""

import json
import math
import random
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hysparse_megatron.data.bulk.tokenizers import bytes_tokenizer
from tests.unit.model.tiny_models import randomize
from tools import choose_full_layers, convert, evaluate, generate

pytestmark = pytest.mark.thorough

IDS, LENGTH, LAYERS = 300, 64, 4


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As before, whatever a tool asked for."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of bytes."""
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
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(20):
        (folder / f"{number}.txt").write_text("".join(random.choices(string.printable, k=2000)))
    return folder


def adopt(original: Path, folder: Path, layout: str, *options: str) -> Path:
    assert convert.main(["adopt", str(original), str(folder), "--layout", layout, *options]) == 0
    return folder


def test_layers_are_chosen_and_the_layout_adopted(
    original: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)  # prepared data are cached here
    windows = adopt(original, tmp_path / "windows", f"{LAYERS}*W", "--window", "3")
    shared = ["--data", str(text), "--sequences", "16"]
    chosen = tmp_path / "layers.json"
    choose = ["--run-dir", str(windows), "--count", "2", "--json", str(chosen), *shared]
    assert choose_full_layers.main(choose) == 0
    told = capsys.readouterr().out
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

    assert found["full"] == pytest.approx(loss_of("full", f"{LAYERS}*F"), abs=1e-3)
    letters = "".join("F" if n in (0, choice["layer"]) else "W" for n in range(LAYERS))
    best = min(choice["losses"].values())
    assert best == pytest.approx(loss_of("two", letters), abs=1e-3)
    assert math.isfinite(found["first_alone"])


def test_it_speaks_and_is_exported(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = adopt(original, tmp_path / "start", "F 2*S F", "--window", "4", "--block-size", "4")
    capsys.readouterr()
    arguments = ["--prompt", "some words", "--max-new-tokens", "5", "--ignore-end"]
    assert generate.main(["--run-dir", str(start), *arguments]) == 0
    assert capsys.readouterr().out
    assert convert.main(["export", "--run-dir", str(start), str(tmp_path / "exported")]) == 0
    described = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert described["suppress_tokens"][0] == 257  # those that the tokenizer does not have


@pytest.mark.parametrize(
    ("layout", "options", "code", "said"),
    [
        ("4*F", ["--count", "2"], 2, "kind F; allowed is W alone"),
        ("4*W", ["--count", "5"], 2, "--count: got 5; allowed at most the 4 layers"),
        ("4*W", ["--count", "2", "--data", "no/such/text"], 5, "no/such/text"),
        ("4*W", ["--count", "2", "--json", "no/such/folder/x"], 2, "--json: cannot write"),
    ],
)
def test_mistakes(
    layout: str, options: list[str], code: int, said: str,
    original: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    start = adopt(original, tmp_path / "start", layout)
    arguments = ["--run-dir", str(start), "--data", str(text), *options]
    assert choose_full_layers.main(arguments) == code
    assert said in capsys.readouterr().err
