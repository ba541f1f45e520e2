"""Back from a Hugging Face folder: the same checkpoint, and training that starts from it."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from hysparse_megatron.checkpoint import store, tensors
from hysparse_megatron.checkpoint.state import load_state
from hysparse_megatron.config import compose
from hysparse_megatron.config.frozen import load_frozen
from hysparse_megatron.config.validate import validate
from hysparse_megatron.errors import CheckpointError
from hysparse_megatron.huggingface import settings
from hysparse_megatron.training.resume import resume
from tests.unit.huggingface.exports import IDS, MOE, Run, load, random_run, saved_run
from tests.unit.model.tiny_models import SEQUENCE
from tools.checkpoint import main as checkpoint_main
from tools.convert import main

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("seed", "group")]

HEAVY = [
    "model.layout=F S W S F",
    "model.qkv_bias=true",
    "model.qk_norm=true",
    "model.gate=channel",
    "model.full_gate=head",
    "model.value_head_dim=12",
    "model.tie_embeddings=true",
    *MOE,
]


def test_how_a_user_splits_runs_is_no_matter_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Presets of one's own in the working directory: three ranks share none of the heads."""
    (tmp_path / "conf" / "local").mkdir(parents=True)
    (tmp_path / "conf" / "local" / "local.yaml").write_text("parallel: {tp: 3, cp: 2}\n")
    monkeypatch.chdir(tmp_path)
    assert compose.compose([]).parallel.tp == 3
    sizes = {"hidden_size": 64, "ffn_hidden_size": 128, "head_dim": 16, "vocab_size": 100}
    tree = {"layout": "F S F", **sizes, "num_attention_heads": 4, "num_query_groups": 2}
    assert settings.model_config(tree).num_attention_heads == 4


def import_folder(source: Path, folder: Path) -> Path:
    assert main(["import", str(source), str(folder)]) == 0
    return folder


def assert_same_weights(run: Run, folder: Path) -> None:
    """`tools.checkpoint diff` finds nothing, types included."""
    first, second = (store.resolve(path) for path in (run.path, folder))
    assert checkpoint_main(["diff", str(first), str(second)]) == 0
    ours, theirs = (tensors.read_index(path) for path in (first, second))
    ours = {name: e for name, e in ours.items() if not name.startswith(tensors.OPTIMIZER)}
    assert {name: e["dtype"] for name, e in ours.items()} == {
        name: e["dtype"] for name, e in theirs.items()
    }


@pytest.mark.parametrize(
    "overrides",
    [["model.layout=F S W S F"], HEAVY, [*HEAVY, "train.precision=bf16"]],
    ids=["dense", "all at once", "all at once in bf16"],
)
def test_round_trip_is_exact(overrides: list[str], tmp_path: Path) -> None:
    with saved_run(tmp_path / "run", *overrides) as run:
        exported = run.export(tmp_path / "exported", "--shard-size", "20KB")
        assert len(list(exported.glob("*.safetensors"))) > 3
        folder = import_folder(exported, tmp_path / "start")
        assert_same_weights(run, folder)

        # Training's own loader takes them.
        tokens = torch.randint(0, IDS, (2, SEQUENCE))
        expected = run.logits(tokens)
        for parameter in run.state.chunks[0].parameters():
            parameter.data.zero_()
        load_state(run.state, store.resolve(folder), weights_only=True)
        assert torch.equal(run.logits(tokens), expected)

        # And the model that the folder describes is the run's.
        model = load_frozen(folder / "config.yaml").model
        made = dataclasses.asdict(dataclasses.replace(model, vocab_size=None, layout=""))
        wanted = dataclasses.replace(run.config.model, vocab_size=None, layout="")
        wanted = dataclasses.replace(wanted, value_head_dim=wanted.value_dim)
        assert made == dataclasses.asdict(wanted)
        assert model.layout == run.config.model.layout.replace(" ", "")


def test_a_model_that_transformers_trained_and_resized(tmp_path: Path) -> None:
    with saved_run(tmp_path / "run", *HEAVY) as run:
        model = load(run.export(tmp_path / "exported"))
        model.resize_token_embeddings(390)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        model.save_pretrained(tmp_path / "trained")
        folder = import_folder(tmp_path / "trained", tmp_path / "start")
        experiment = yaml.safe_load((folder / "experiment.yaml").read_text())
        assert experiment["model"]["vocab_size"] == 390
        assert experiment["checkpoint"]["load"] == str(folder)

        weights = tensors.read_weights(store.resolve(folder))
        embedding = weights["embedding.word_embeddings.weight"]
        assert embedding.shape[0] == 512  # a multiple of 128, as training has it
        assert torch.equal(embedding[:390], model.get_input_embeddings().weight)
        assert not embedding[390:].any()
        [attention] = [layer.self_attn for layer in model.model.layers[3:4]]
        assert torch.equal(
            weights["decoder.layers.3.self_attention.sparse_sink"], attention.sparse_sink
        )


def test_a_run_starts_with_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied to conf/experiment/ it is the model, the weights and the tokenizer."""
    random_run(tmp_path / "run", *HEAVY)
    tokenizer = ["--tokenizer", str(tmp_path / "run" / "tokenizer.json")]
    assert (
        main(["export", "--run-dir", str(tmp_path / "run"), *tokenizer, str(tmp_path / "out")]) == 0
    )
    folder = import_folder(tmp_path / "out", tmp_path / "start")
    shutil.copytree(compose.config_directory(), tmp_path / "conf")
    shutil.copy(folder / "experiment.yaml", tmp_path / "conf" / "experiment" / "tuned.yaml")
    monkeypatch.setattr(compose, "config_directory", lambda: tmp_path / "conf")
    config = compose.compose(
        ["experiment=tuned", "parallel.tp=2", "parallel.sequence_parallel=true"]
    )
    assert config.model == load_frozen(folder / "config.yaml").model
    assert config.checkpoint.load == str(folder)
    assert config.data.tokenizer == str(folder / "tokenizer.json")
    assert not validate(config, world_size=2)


def test_weights_alone_are_not_continued(tmp_path: Path) -> None:
    random_run(tmp_path / "run", "model.layout=F")
    checkpoint = store.resolve(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"new run_dir with checkpoint\.load="):
        resume(SimpleNamespace(), checkpoint, SimpleNamespace(), {}, print)
