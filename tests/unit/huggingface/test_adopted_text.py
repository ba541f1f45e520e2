"""An adopted model is given texts as its tokenizer prepares them: as in transformers."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hysparse_megatron.data.tokenizer import bytes_tokenizer
from tests.unit.model.tiny_models import randomize
from tools import convert, evaluate, generate

pytestmark = pytest.mark.usefixtures("seed")

IDS, LENGTH, NEW = 258, 32, 8
END, BEGIN = 256, 257
TEXT = "Documents begin with one token, and so does this, whose end is cut off."


@pytest.fixture(params=[True, False], ids=["a begin", "none"])
def begins(request: pytest.FixtureRequest) -> bool:
    """Whether the tokenizer begins every text with a token."""
    return bool(request.param)


@pytest.fixture
def original(begins: bool, tmp_path: Path) -> PreTrainedModel:
    """A random Llama, saved with a tokenizer of bytes."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=IDS,
            hidden_size=48,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    ).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "original")
    tokenizer = bytes_tokenizer()
    tokenizer.add_special_tokens(["<s>"])
    if begins:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BEGIN)]
        )
    tokenizer.save(str(tmp_path / "original" / "tokenizer.json"))
    return model


@pytest.fixture
def start(
    original: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Path:
    """What it is adopted into, with nothing to be warned of."""
    monkeypatch.chdir(tmp_path)  # where the cache of prepared text goes
    options = ["--layout", "2*F", "--window", "64", "--block-size", "4", "--num-selected", "16"]
    assert convert.main(["adopt", "original", "start", *options]) == 0
    assert "around a text" not in capsys.readouterr().out
    return tmp_path / "start"


@pytest.fixture
def ids_of(tmp_path: Path) -> Callable[[str], list[int]]:
    """Ids of a text, by transformers."""
    return lambda text: AutoTokenizer.from_pretrained(tmp_path / "original")(text).input_ids


def test_the_held_out_loss_is_theirs(
    begins: bool, original: PreTrainedModel, start: Path, ids_of: Callable[[str], list[int]]
) -> None:
    text = TEXT[: LENGTH - begins]
    Path("text.txt").write_text(text)
    given = ["--run-dir", str(start), "--data", "text.txt", "--lengths", str(LENGTH)]
    assert evaluate.main([*given, "--json", "loss.json"]) == 0
    [found] = json.loads(Path("loss.json").read_text())["loss"]
    ids = torch.tensor([[*ids_of(text), END]])
    assert ids.shape == (1, LENGTH + 1)
    assert (ids[0, 0] == BEGIN) == begins
    with torch.no_grad():
        expected = original(input_ids=ids, labels=ids).loss
    assert found["all"]["tokens"] == LENGTH
    assert found["all"]["loss"] == pytest.approx(float(expected), abs=1e-4)


def test_a_prompt_is_theirs(
    begins: bool,
    original: PreTrainedModel,
    start: Path,
    ids_of: Callable[[str], list[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--run-dir", str(start), "--max-new-tokens", str(NEW), "--ignore-end"]
    for prompt in (TEXT, ""):
        capsys.readouterr()
        assert generate.main([*given, "--prompt", prompt]) == 0
        text, told = capsys.readouterr()
        ids = ids_of(prompt) or [END]
        assert (ids[0] == BEGIN) == begins
        [prefilled] = re.findall(r"prefill: (\d+) tokens", told)
        assert int(prefilled) == len(ids)
        made = torch.tensor([ids])
        for _ in range(NEW):
            with torch.no_grad():
                likeliest = original(input_ids=made).logits[:, -1:].argmax(-1)
            made = torch.cat([made, likeliest], 1)
        library = AutoTokenizer.from_pretrained("original")
        assert text == library.decode(made[0, len(ids) :]) + "\n"
