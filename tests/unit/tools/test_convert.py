"""`python -m tools.convert`: what it refuses, its memory, and what loading a folder needs."""

import json
import os
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hysparse_megatron.checkpoint.assemble import Source, save_weights
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.frozen import freeze
from hysparse_megatron.data.tokenizer import bytes_tokenizer, train_tokenizer
from hysparse_megatron.files import sha256_of
from hysparse_megatron.huggingface.weights import model_weights
from tests.captured import Call, captured
from tests.unit.huggingface.exports import IDS, load, random_run
from tests.unit.model.tiny_models import tiny_config
from tools.convert import main

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, session_seed: int) -> Path:
    """A run, and what is exported of it in several shards."""
    torch.manual_seed(session_seed)
    folder = tmp_path_factory.mktemp("convert")
    random_run(folder / "run", "model.layout=F S W F")
    assert export(folder / "run", folder / "out", "--shard-size", "30KB") == 0
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


@pytest.fixture
def exported(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def words(run_dir: Path, folder: Path, *options: str) -> list[str]:
    tokenizer = [] if "--tokenizer" in options else ["--tokenizer", str(run_dir / "tokenizer.json")]
    return ["export", "--run-dir", str(run_dir), *options, *tokenizer, str(folder)]


def export(run_dir: Path, folder: Path, *options: str) -> int:
    return main(words(run_dir, folder, *options))


@pytest.fixture
def refused(tmp_path: Path, call: Call) -> Call:
    """What an export of a run to `out` that ends with a code says."""
    return lambda run, code, *options: call(main, words(run, tmp_path / "out", *options), code).err


class TestExportRefuses:
    def test_what_is_no_run(self, tmp_path: Path, refused: Call) -> None:
        assert "is no run directory: no config.yaml" in refused(tmp_path, 2)

    def test_a_run_without_checkpoint(self, run: Path, refused: Call) -> None:
        shutil.rmtree(run / "checkpoints")
        assert "no valid checkpoint" in refused(run, 6)

    def test_a_step_that_is_not_there(self, run: Path, tmp_path: Path, refused: Call) -> None:
        assert "step-00000007 is damaged or missing" in refused(run, 6, "--checkpoint", "7")
        assert export(run, tmp_path / "out", "--checkpoint", "last") == 2
        assert export(run, tmp_path / "out", "--checkpoint", "0") == 0

    def test_a_damaged_checkpoint(self, run: Path, tmp_path: Path, refused: Call) -> None:
        path = next((run / "checkpoints").rglob("__0_9.distcp"))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert f"{path} has another content" in refused(run, 6)
        assert not (tmp_path / "out").exists()

    def test_another_model(self, run: Path, refused: Call) -> None:
        freeze(tiny_config("model.layout=F S W S", f"model.vocab_size={IDS}"), run)
        error = refused(run, 6)
        assert "was made with other settings than the run's" in error
        name = "decoder.layers.3.self_attention.linear_qkv.linear.weight"
        assert f"{name}: the checkpoint has [64, 24], config.yaml has [72, 24]" in error

    def test_a_folder_that_is_taken(self, run: Path, tmp_path: Path, refused: Call) -> None:
        (tmp_path / "out").mkdir()
        assert export(run, tmp_path / "out") == 0  # an empty one is not
        assert "exists and is not written over" in refused(run, 2)

    def test_another_tokenizer(self, tmp_path: Path, refused: Call) -> None:
        run = random_run(tmp_path / "run", "model.layout=F", identity={"vocab_size": 300})
        assert "has 257 token ids, but the run trained with 300" in refused(run, 2)
        assert "cannot read the tokenizer" in refused(
            run, 2, "--tokenizer", str(tmp_path / "none.json")
        )

    def test_a_tokenizer_that_is_gone(self, run: Path, tmp_path: Path, call: Call) -> None:
        (run / "tokenizer.json").unlink()
        told = call(main, ["export", "--run-dir", str(run), str(tmp_path / "out")], code=2).err
        assert "name its tokenizer.json with --tokenizer" in told

    @pytest.mark.parametrize(
        "option", [("--shard-size", "5"), ("--shard-size", "0GB"), ("--dtype", "fp8")]
    )
    def test_odd_options(self, option: tuple[str, str], run: Path, tmp_path: Path) -> None:
        assert export(run, tmp_path / "out", *option) == 2


@pytest.mark.parametrize("sink", ["nan", "inf", "-inf", "1e400", "1e39", "four"])
def test_a_sink_that_is_no_logit(sink: str, tmp_path: Path, call: Call) -> None:
    words = ["adopt", str(tmp_path), str(tmp_path / "new"), "--layout", "F"]
    error = call(main, [*words, f"--sparse-sink={sink}"], code=2).err
    assert f"got {sink}; allowed a number from -100 to 100" in error


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(value: float, made: Path, tmp_path: Path, call: Call) -> None:
    """Neither from a folder nor from a checkpoint; the tensor is named."""
    source = Path(shutil.copytree(made / "out", tmp_path / "source"))
    for path in source.glob("*.safetensors"):
        if (name := "model.layers.1.mlp.down_proj.weight") in (held := load_file(path)):
            held[name][2, 3] = value
            save_file(held, path, metadata={"format": "pt"})
    error = call(main, ["import", str(source), str(tmp_path / "start")], code=6).err
    assert "decoder.layers.1.mlp.linear_fc2.weight holds NaN or infinity" in error
    assert "Traceback" not in error

    config = tiny_config("model.layout=F", f"model.vocab_size={IDS}")
    sources = {
        weight.name: Source(weight.shape, torch.float32, lambda w=weight: torch.ones(w.shape))
        for weight in model_weights(config.model, 384)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hysparse_megatron.checkpoint.assemble.is_finite", lambda tensor: True)
        name = "decoder.final_norm.weight"
        bad = sources[name]
        sources[name] = Source(bad.shape, bad.dtype, lambda: torch.full(bad.shape, value))
        save_weights(tmp_path / "run" / "checkpoints", sources, {})
    freeze(config, tmp_path / "run")
    bytes_tokenizer().save(str(tmp_path / "run" / "tokenizer.json"))
    error = call(main, words(tmp_path / "run", tmp_path / "out"), code=6).err
    assert f"{name} holds NaN or infinity" in error
    assert not (tmp_path / "start").exists()
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_is_found_by_its_hash(tmp_path: Path) -> None:
    bytes_tokenizer().save(str(tmp_path / "tokenizer.json"))
    identity = {"tokenizer_sha256": sha256_of(tmp_path / "tokenizer.json"), "vocab_size": IDS}
    run = random_run(tmp_path / "run", "model.layout=F", identity=identity)
    for name, content in (("a", "{}"), ("b", (tmp_path / "tokenizer.json").read_text())):
        (run / "cache" / name).mkdir(parents=True)
        (run / "cache" / name / "tokenizer.json").write_text(content)
    assert main(["export", "--run-dir", str(run), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() != "{}"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 256
    assert "suppress_tokens" not in generation


def test_types_and_shards(made: Path, run: Path, tmp_path: Path) -> None:
    index = json.loads((made / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    held = {name: load_file(made / "out" / name) for name in shards}
    assert {n: file for file, found in held.items() for n in found} == index["weight_map"]
    sizes = [sum(t.nbytes for t in found.values()) for found in held.values()]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert all(
        size <= 30_000 or len(found) == 1 for size, found in zip(sizes, held.values(), strict=True)
    )

    assert export(run, tmp_path / "out", "--dtype", "bf16") == 0
    narrow = load_file(tmp_path / "out" / "model.safetensors")
    wide = {name: tensor for found in held.values() for name, tensor in found.items()}
    assert narrow.keys() == wide.keys()
    for name, tensor in wide.items():
        expected = tensor if name.endswith("_sink") else tensor.bfloat16()
        assert torch.equal(narrow[name], expected), name
        assert narrow[name].dtype == expected.dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_files_have_the_modes_of_new_ones(run: Path, tmp_path: Path) -> None:
    """Also those that a library makes for the user alone."""
    for umask, for_files, for_folders in ((0o022, 0o644, 0o755), (0o007, 0o660, 0o770)):
        before = os.umask(umask)
        try:
            out, start = tmp_path / f"out-{umask}", tmp_path / f"start-{umask}"
            assert export(run, out) == 0
            assert main(["import", str(out), str(start)]) == 0
        finally:
            os.umask(before)
        for path in (out, start, *out.rglob("*"), *start.rglob("*")):
            assert path.stat().st_mode & 0o777 == (for_folders if path.is_dir() else for_files)


@pytest.mark.parametrize(
    ("command", "package"),
    [("export", "safetensors"), ("import", "safetensors"), ("adopt", "transformers")],
)
def test_a_package_that_is_not_there(
    command: str,
    package: str,
    made: Path,
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what is None cannot be imported
    given = {
        "export": ["--run-dir", str(made / "run")],
        "import": [str(made / "out")],
        "adopt": [str(made / "out"), "--layout", "F"],
    }
    error = call(main, [command, *given[command], str(tmp_path / "new")], code=2).err
    assert f"{command} needs the package {package}" in error
    assert "the extra `huggingface`" in error
    assert not (tmp_path / "new").exists()


class TestImportRefuses:
    def refused(self, source: Path, code: int, said: str, call: Call) -> None:
        target = source.parent / "start"
        assert said in call(main, ["import", str(source), str(target)], code).err
        assert not list(source.parent.glob("start*"))

    def test_what_is_no_model(self, tmp_path: Path, call: Call) -> None:
        (tmp_path / "none").mkdir()
        self.refused(tmp_path / "none", 2, "is no Hugging Face folder: it has no config", call)

    def test_another_architecture(self, exported: Path, call: Call) -> None:
        edit(exported, model_type="llama")
        self.refused(exported, 2, "is a model of type llama, not hysparse", call)

    def test_settings_that_are_not_there_or_cannot_be(self, exported: Path, call: Call) -> None:
        edit(exported, num_attention_heads=3)
        self.refused(exported, 2, "model.num_attention_heads", call)
        edit(exported, num_attention_heads=8)
        self.refused(exported, 2, "the tensors do not fit config.json", call)
        settings = json.loads((exported / "config.json").read_text())
        del settings["block_size"]
        (exported / "config.json").write_text(json.dumps(settings))
        self.refused(exported, 2, "lacks block_size", call)
        (exported / "config.json").write_text("{")
        self.refused(exported, 2, "config.json cannot be read", call)

    def test_what_transformers_would_read_besides(self, exported: Path, call: Call) -> None:
        (exported / "adapter_config.json").touch()
        self.refused(exported, 2, "merge the adapter into the weights first", call)
        (exported / "adapter_config.json").unlink()
        edit(exported, per_layer_config={"0": {"sliding_window": 3}})
        self.refused(exported, 2, "per_layer_config {'0': {'sliding_window': 3}}; allowed", call)

    def test_shards_that_are_missing_or_truncated(self, exported: Path, call: Call) -> None:
        path = sorted(exported.glob("*.safetensors"))[1]
        content = path.read_bytes()
        path.write_bytes(content[:-100])
        self.refused(exported, 6, f"{path} is missing or damaged", call)
        path.unlink()
        self.refused(exported, 6, f"{path} is missing or damaged", call)
        save_file({"other": torch.zeros(1)}, path)
        self.refused(exported, 6, "which model.safetensors.index.json says it holds", call)
        (exported / "model.safetensors.index.json").unlink()
        self.refused(exported, 2, "holds neither model.safetensors nor", call)

    def test_quantised_weights(self, run: Path, tmp_path: Path, call: Call) -> None:
        assert export(run, tmp_path / "out") == 0
        path = tmp_path / "out" / "model.safetensors"
        tensors = load_file(path)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
        save_file(tensors, path)
        self.refused(tmp_path / "out", 2, "lm_head.weight is I8; allowed F32", call)

    def test_another_tokenizer(self, exported: Path, call: Call) -> None:
        train_tokenizer(["abc abd bcd"] * 9, 260).save(str(exported / "tokenizer.json"))
        self.refused(exported, 2, "260 token ids, but the model 257: it is another's", call)

    def test_a_tokenizer_with_tokens_added_beyond_the_rows(
        self, exported: Path, tmp_path: Path, call: Call
    ) -> None:
        """As many published folders have: they can be used but for these, there and back."""
        tokenizer = bytes_tokenizer()
        tokenizer.add_tokens(["<pad>", "<end>"])
        tokenizer.save(str(exported / "tokenizer.json"))
        described = json.loads((exported / "tokenizer_config.json").read_text())
        (exported / "tokenizer_config.json").write_text(
            json.dumps(described | {"eos_token": "<end>"})
        )
        self.refused(exported, 2, "documents would end with <end> (id 258)", call)
        (exported / "tokenizer_config.json").write_text(json.dumps(described))
        start, again = tmp_path / "start", tmp_path / "again"
        said = "has 259 token ids, but the model 257: the 2 added from <pad> on cannot be used"
        assert said in call(main, ["import", str(exported), str(start)]).out
        assert said in call(main, ["export", "--run-dir", str(start), str(again)]).out
        assert load(again).config.vocab_size == 257


def edit(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


LOAD = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hysparse_megatron", "hysparse_kernels", "megatron"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder, expected = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
saved = torch.load(expected)
with torch.no_grad():
    torch.testing.assert_close(model(saved["tokens"]).logits, saved["logits"])
assert tokenizer.decode(tokenizer("Größe").input_ids) == "Größe"
said = pipeline("text-generation", model=model, tokenizer=tokenizer)("Once", max_new_tokens=3)
print(type(model).__name__, ascii(said[0]["generated_text"]).strip("'\\""))
"""


@pytest.mark.thorough
def test_loading_needs_nothing_of_ours(made: Path, tmp_path: Path) -> None:
    tokens = torch.randint(0, IDS, (2, 20))
    with torch.no_grad():
        logits = load(made / "out")(tokens).logits
    torch.save({"tokens": tokens, "logits": logits}, tmp_path / "expected.pt")
    result = captured(
        [sys.executable, "-c", LOAD, str(made / "out"), str(tmp_path / "expected.pt")],
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
    )
    assert result.stdout.startswith("HySparseForCausalLM Once")


MEASURE = """
import resource, sys
import safetensors.torch
import hysparse_megatron.huggingface.export
import hysparse_megatron.huggingface.importing
from tools.convert import main

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
assert main(sys.argv[1:]) == 0
print(peak() - before)
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_memory_is_that_of_a_shard(tmp_path: Path) -> None:
    """273 MB of weights, 20 MB in a shard, both ways."""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = compose(
        [
            "model.layout=12*(F S)",
            "model.hidden_size=512",
            "model.ffn_hidden_size=1408",
            "model.num_attention_heads=8",
            "model.num_query_groups=2",
            "model.head_dim=64",
            "model.vocab_size=1024",
        ]
    )
    sources = {
        weight.name: Source(weight.shape, torch.float32, lambda w=weight: torch.randn(w.shape))
        for weight in model_weights(config.model, 1024)
    }
    assert sum(torch.Size(source.shape).numel() * 4 for source in sources.values()) > 270e6
    save_weights(tmp_path / "run" / "checkpoints", sources, {})
    freeze(config, tmp_path / "run")
    bytes_tokenizer().save(str(tmp_path / "run" / "tokenizer.json"))
    tokenizer = ["--tokenizer", str(tmp_path / "run" / "tokenizer.json"), "--shard-size", "20MB"]
    for command in (
        ["export", "--run-dir", str(tmp_path / "run"), *tokenizer, str(tmp_path / "out")],
        ["import", str(tmp_path / "out"), str(tmp_path / "start")],
    ):
        result = captured([sys.executable, "-c", MEASURE, *command], cwd=ROOT)
        grown = int(result.stdout.split()[-1]) * 1024
        assert grown < 120e6, command[0]
