"""What an exported folder says of itself, and what of it loads without its code."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from hysparse_megatron.config.frozen import load_frozen
from hysparse_megatron.data.tokenizer import bytes_tokenizer, load_tokenizer
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.huggingface import tokenizer_files
from hysparse_megatron.huggingface.model_card import model_card
from tests.unit.huggingface.exports import IDS, load, random_run
from tools import prepare_data
from tools.convert import main

DATA = {
    "fingerprint": "f00d",
    "train_documents": 1200,
    "train_tokens": 34567,
    "validation_documents": 12,
    "validation_tokens": 345,
}
EVALUATIONS = [
    {"step": 0, "eval_loss": 5.5, "eval_tokens": 64},
    {"step": 0, "eval_loss": 6.25, "eval_tokens": 128, "evaluation": "code"},
    {"step": 7, "eval_loss": 1.25, "eval_tokens": 64},
]
BEGIN = 1
"""An id of the tokenizer that no text here has."""
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, session_seed: int) -> Path:
    """A run with evaluations, and data prepared with a published tokenizer that has a
    chat template, exported after step 0."""
    torch.manual_seed(session_seed)
    folder = tmp_path_factory.mktemp("card")
    run = random_run(folder / "run", "model.layout=F 2*S | F W", "name=small", identity=DATA)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EVALUATIONS))
    published = folder / "published"
    published.mkdir()
    shutil.copyfile(run / "tokenizer.json", published / "tokenizer.json")
    (published / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "text.txt").write_text("some words " * 500)
    options = ["--tokenizer", str(published), "--output", str(folder / "data")]
    assert prepare_data.main([*options, str(folder / "text.txt")]) == 0
    tokenizer = ["--tokenizer", str(folder / "data" / "tokenizer.json")]
    given = ["--run-dir", str(run), *tokenizer, "--license", "apache-2.0", str(folder / "out")]
    assert main(["export", *given]) == 0
    return folder / "out"


def card_of(folder: Path) -> tuple[dict, str]:
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_the_card_says_what_the_model_is(exported: Path) -> None:
    metadata, text = card_of(exported)
    assert metadata["license"] == "apache-2.0"
    assert metadata["library_name"] == "transformers"
    assert text.count("# small\n") == 1
    assert "`FSSFW`" in text
    assert "| full attention | 2 layers |" in text
    model = load(exported)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"| parameters | {parameters:,}, {parameters:,} of them active for a token |" in text
    assert f"| token ids | {IDS} |" in text


def test_the_card_says_what_it_read_and_how_good_it_is(exported: Path) -> None:
    _, text = card_of(exported)
    assert "| train split | 1,200 documents, 34,567 tokens |" in text
    assert "| fingerprint | `f00d` |" in text
    assert "| held-out part of the training data | 0 | 5.5000 | 64 |" in text
    assert "| code | 0 | 6.2500 | 128 |" in text
    assert "1.2500" not in text, "an evaluation of a later step"


def test_what_is_not_known_is_said(exported: Path) -> None:
    config = load_frozen(exported.parent / "run" / "config.yaml")
    card = model_card(config, {"step": 3}, {}, vocab_rows=IDS, num_parameters=9, license_id=None)
    metadata = yaml.safe_load(card.split("---\n", 2)[1])
    assert "license" not in metadata
    assert "None of the weights is stated" in card
    assert "does not say what it was trained on" in card
    assert "no evaluation up to this step" in card


def test_the_tokenizer_needs_no_code_of_the_folder(exported: Path, tmp_path: Path) -> None:
    without_code = tmp_path / "tokenizer"
    shutil.copytree(exported, without_code, ignore=shutil.ignore_patterns("*.py"))
    fast = PreTrainedTokenizerFast.from_pretrained(without_code)
    auto = AutoTokenizer.from_pretrained(without_code, trust_remote_code=False)
    for tokenizer in (fast, auto):
        assert tokenizer("abc").input_ids == [97, 98, 99]
        assert tokenizer.eos_token_id == IDS - 1
        said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert said == "<user>hi"


def test_generation_needs_no_prompt(exported: Path) -> None:
    assert GenerationConfig.from_pretrained(exported).bos_token_id == IDS - 1
    made = load(exported).generate(max_new_tokens=3, min_new_tokens=3)
    assert made.shape == (1, 4)
    assert made[0, 0] == IDS - 1


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("trained", [BEGIN, None])
def test_generation_begins_as_documents_did(
    adds: bool, trained: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who exports a tokenizer that begins a text otherwise is told."""
    identity = DATA | ({} if trained is None else {"begin_of_document": trained})
    run = random_run(tmp_path / "run", "model.layout=F", identity=identity)
    tokenizer = bytes_tokenizer()
    name = tokenizer.id_to_token(BEGIN)
    if adds:
        special = [(name, BEGIN)]
        tokenizer.post_processor = TemplateProcessing(single=f"{name} $A", special_tokens=special)
    tokenizer.save(str(run / "tokenizer.json"))
    given = ["--run-dir", str(run), "--tokenizer", str(run / "tokenizer.json")]
    assert main(["export", *given, str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert found.bos_token_id == (IDS - 1 if trained is None else BEGIN)
    assert found.eos_token_id == IDS - 1
    puts, began = (name if has else "nothing" for has in (adds, trained is not None))
    warned = f"puts {puts} before a text, but documents began with {began} in training" in told
    assert warned == (adds != (trained is not None))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert theirs("xy").input_ids == [BEGIN] * adds + [120, 121]
    assert theirs.bos_token_id == trained


def test_a_license_is_one_value(exported: Path) -> None:
    config = load_frozen(exported.parent / "run" / "config.yaml")

    def card(license_id: str) -> str:
        about = {"vocab_rows": IDS, "num_parameters": 9, "license_id": license_id}
        return model_card(config, {"step": 3}, {}, **about)

    for told in ("no: other", "[x", "apache-2.0"):
        assert yaml.safe_load(card(told).split("---\n", 2)[1])["license"] == told
    with pytest.raises(ConfigError, match="--license: got"):
        card("a\nb: c")


def test_code_of_a_published_tokenizer_is_not_asked_for(exported: Path, tmp_path: Path) -> None:
    """Its code stays behind; the rest of what describes it comes along."""
    source, target = tmp_path / "published", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    path = shutil.copyfile(exported / "tokenizer.json", source / "tokenizer.json")
    described = {"tokenizer_class": "MyTokenizer", "eos_token": "<|endoftext|>"}
    own = {"auto_map": {"AutoTokenizer": ["tokenization_my.MyTokenizer", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(described | own))
    tokenizer_files.write_tokenizer(path, target, load_tokenizer(str(path)), 64)
    assert json.loads((target / "tokenizer_config.json").read_text()) == described
    assert AutoTokenizer.from_pretrained(target).eos_token_id == IDS - 1


def test_ids_without_a_token_are_suppressed(tmp_path: Path) -> None:
    """Between those of the tokenizer too."""
    run = random_run(tmp_path / "run", "model.vocab_size=262", "model.layout=F")
    path = run / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][0]["id"] = content["model"]["vocab"]["<|endoftext|>"] = 259
    path.write_text(json.dumps(content))
    folder = tmp_path / "out"
    assert main(["export", "--run-dir", str(run), "--tokenizer", str(path), str(folder)]) == 0
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.suppress_tokens == [256, 257, 258, 260, 261]
    assert load_tokenizer(str(path)).holes == {256, 257, 258}
