"""Random folders of full-attention models as they are found: old and new settings, types, shards.

A folder is drawn whole first, in any of the ways that transformers and this project read alike.
One of `folder_flaws.FLAWS` may then be put in.
"""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.unit.model.tiny_models import randomize

KINDS = ("llama", "mistral", "qwen2", "qwen3")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclasses.dataclass
class Folder:
    """One that is being drawn: `config.json`, its tensors, and how they are written."""

    path: Path
    rng: random.Random
    settings: dict[str, Any]
    layers: int
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    files: int = 1
    """In how many the tensors are; 0 is one, with an index."""
    place: str = ""
    """Where shards are."""

    @property
    def kind(self) -> str:
        return self.settings["model_type"]

    def write(self) -> None:
        """Anew."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        (self.path / "config.json").write_text(json.dumps(self.settings, indent=1))
        if self.files == 1:
            save_file(self.tensors, self.path / SINGLE)
        else:
            write_shards(self.path, self.tensors, max(1, self.files), self.place)


def write_shards(folder: Path, tensors: dict[str, Tensor], count: int, where: str = "") -> None:
    """In the folder, or `where` in it; a whole path is written as such into the index."""
    names = sorted(tensors)
    place = {}
    (folder / where).mkdir(exist_ok=True)
    for number in range(count):
        held = names[number::count]
        file = str(Path(where) / f"model-{number + 1:05}-of-{count:05}.safetensors")
        # One is in the next shard as well, as it is.
        again = names[max(0, number - 1) :][:1]
        save_file({name: tensors[name] for name in {*held, *again}}, folder / file)
        place |= dict.fromkeys(held, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))


def draw(path: Path, rng: random.Random) -> Folder:
    """A folder that both read, written."""
    layers = rng.choice([1, 2, 3])
    kind = rng.choice(KINDS)
    folder = Folder(path, rng, {"model_type": kind, "num_hidden_layers": layers}, layers)
    is_scaled = rng.random() < 0.5
    rope = scaled_rotary(rng) if is_scaled else rotary(rng)
    folder.settings |= sizes(kind, rng) | windows(kind, layers, rng) | rope
    folder.settings |= drawn(
        rng,
        rms_norm_eps=[1e-5, 1e-6, 1e-3],
        hidden_act=["silu", "swish"],
        tie_word_embeddings=[True, False],
        initializer_range=[0.02, 0.1],
        attention_dropout=[0.0, 0.1],
        torch_dtype=["float16", "bfloat16", "float32"],
        transformers_version=["4.31.0", "4.57.1", "5.2.0"],
        use_cache=[True, False],
        # What transformers reads no more, or not for these architectures.
        pretraining_tp=[1, 2],
        logit_scale=[0.25],
        residual_multiplier=[0.5],
        rotary_dim=[4],
        # Where nothing is scaled; else transformers itself fails.
        partial_rotary_factor=[1.0 if is_scaled else 0.5, 1.0],
        qk_layernorm=[True],
        mup_width_multiplier=[2.0],
    )
    if kind in ("mistral", "qwen2"):
        folder.settings |= drawn(rng, attention_bias=[True, False], mlp_bias=[True])
    elif kind == "qwen3":
        folder.settings |= drawn(rng, attention_bias=[False], mlp_bias=[True])
    else:
        folder.settings |= drawn(rng, attention_bias=[False], mlp_bias=[False])
    order = list(folder.settings)
    rng.shuffle(order)
    folder.settings = {name: folder.settings[name] for name in order}
    folder.tensors = weights(folder)
    folder.files = rng.choice([1, 1, 0, 2, 3, 7])
    folder.place = rng.choice(["", "", "shards", str(path)])
    folder.write()
    leave_behind(folder)
    return folder


def drawn(rng: random.Random, **choices: list[Any]) -> dict[str, Any]:
    """Some of them, each with one of its values."""
    return {name: rng.choice(values) for name, values in choices.items() if rng.random() < 0.4}


def sizes(kind: str, rng: random.Random) -> dict[str, Any]:
    heads = rng.choice([1, 2, 3, 4, 6, 8, 32])
    groups: dict[str, Any] = {}
    # What is left out is as many as there are heads, or a number of the architecture.
    default = {"llama": heads, "mistral": 8, "qwen2": 32, "qwen3": 32}[kind]
    if heads != default or rng.random() < 0.7:
        groups["num_key_value_heads"] = rng.choice([n for n in (1, 2, 3, 4, 8) if heads % n == 0])
        if rng.random() < 0.2:
            groups["num_key_value_heads"] = None if kind != "mistral" else heads
    width = rng.choice([4, 6, 8, 12] if heads < 8 else [2, 4])
    head_dim = {"head_dim": rng.choice([4, 8, 10, 16])} if rng.random() < 0.6 else {}
    if not head_dim and kind in ("llama", "mistral") and rng.random() < 0.3:
        head_dim = {"head_dim": None}
    found = {
        "hidden_size": heads * width,
        "intermediate_size": rng.choice([20, 33, 48]),
        "num_attention_heads": heads,
        "vocab_size": rng.choice([50, 65, 130, 257]),
    }
    return found | groups | head_dim | drawn(rng, max_position_embeddings=[16, 32, 64])


def windows(kind: str, layers: int, rng: random.Random) -> dict[str, Any]:
    """None that is used."""
    if kind == "mistral":
        return {"sliding_window": None}
    if kind == "llama":
        return rng.choice([{}, {"sliding_window": None}])
    return rng.choice(
        [
            {},
            {"sliding_window": None},
            {"sliding_window": 4, "use_sliding_window": False, "max_window_layers": 0},
            {"sliding_window": 4, "max_window_layers": 0},
            {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": layers},
            {"sliding_window": 4, "use_sliding_window": True},  # from the 28th layer on
            {"layer_types": ["full_attention"] * layers},
        ]
    )


def rotary(rng: random.Random) -> dict[str, Any]:
    theta = rng.choice([500.0, 10000.0, 1e6, 5000])
    plain = rng.choice([{"rope_type": "default"}, {"type": "default"}])
    return rng.choice(
        [
            {},
            {"rope_theta": theta},
            {"rope_theta": theta, "rope_scaling": None},
            {"rope_theta": theta, "rope_scaling": plain},
            {"rope_parameters": plain | {"rope_theta": theta}},
            {"rope_parameters": {"rope_theta": theta}},
            {"rope_parameters": plain, "rope_theta": theta},
            {"rope_parameters": plain | {"rope_theta": 300.0}, "rope_theta": theta},
            {"rope_parameters": plain | {"rope_theta": theta, "partial_rotary_factor": 0.5}},
            {"rope_parameters": None, "rope_theta": theta},
        ]
    )


def scaled_rotary(rng: random.Random) -> dict[str, Any]:
    """For longer texts than the original's, in all places where it is found."""
    kind = rng.choice(["linear", "llama3", "yarn"])
    theta = {"rope_theta": rng.choice([500.0, 10000.0, 1e6])}
    scaling = {rng.choice(["type", "rope_type"]): kind, "factor": rng.choice([1.0, 2, 4.0, 8.0])}
    beside = {}
    if kind == "llama3":
        scaling |= {"low_freq_factor": rng.choice([1.0, 2]), "high_freq_factor": 4.0}
    if kind == "yarn":
        scaling |= drawn(
            rng,
            beta_fast=[32, 4.0, None],
            beta_slow=[1, 0.5],
            attention_factor=[0.8, None],
            mscale=[0.7, 0],
            mscale_all_dim=[1.0],
            truncate=[False, True, None],
            factor=[None, 3.0],
        )
    if kind != "linear":
        where = rng.choice([scaling, beside, {}])
        where["original_max_position_embeddings"] = rng.choice([4, 8, 16])
    return beside | rng.choice(
        [
            theta | {"rope_scaling": scaling},
            {"rope_scaling": scaling},
            {"rope_parameters": theta | scaling},
            {"rope_parameters": scaling} | theta,
            # Saved by transformers 5, with lines of a model card added.
            {"rope_parameters": {"rope_type": "default"} | theta, "rope_scaling": scaling},
            {"rope_parameters": theta | {"rope_type": "default"}, "rope_scaling": scaling | theta},
        ]
    )


def weights(folder: Folder) -> dict[str, Tensor]:
    """Of the model that transformers makes of the settings, in the types of the draw."""
    rng = folder.rng
    folder.write()
    config = AutoConfig.from_pretrained(folder.path)
    model = AutoModelForCausalLM.from_config(config).float()
    randomize(model, std=1.0)
    found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        how = rng.choice(["alone", "twice", "different"])
        found[HEAD] = found[EMBEDDING].clone()
        if how == "alone":
            del found[HEAD]
        elif how == "different":
            found[HEAD].normal_(std=0.2)
    if rng.random() < 0.3:
        half = config.num_attention_heads
        found |= {
            f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(half)
            for layer in range(folder.layers)
        }
    types = [torch.float32, torch.bfloat16, torch.float16]
    only = rng.choice([*types, None])
    # In order, so that the same seed draws the same types.
    return {name: found[name].to(only or rng.choice(types)) for name in sorted(found)}


def leave_behind(folder: Folder) -> None:
    """Files from before, and of other programs, that are not read."""
    rng, path = folder.rng, folder.path
    older = {name: torch.rand_like(tensor.float()) for name, tensor in folder.tensors.items()}
    if folder.files == 1 and rng.random() < 0.6:
        write_shards(path, older, 2)
        if rng.random() < 0.5:
            (path / "model-00002-of-00002.safetensors").unlink()
        elif rng.random() < 0.5:
            (path / INDEX).unlink()
    if folder.files != 1 and rng.random() < 0.4:
        save_file(older, path / "consolidated.safetensors")
        save_file(older, path / "model-00001-of-00009.safetensors")
    if rng.random() < 0.3:
        (path / "pytorch_model.bin").write_bytes(b"old")
        (path / "generation_config.json").write_text('{"do_sample": false}')
