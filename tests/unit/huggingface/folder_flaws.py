"""What is wrong with a drawn folder, and what must be said of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit.huggingface.drawn_folders import INDEX, Folder

Flaw = tuple[Callable[[Folder], None], int, str]


def setting(code: int = 2, said: str = "", **values: Any) -> Flaw:
    def put(folder: Folder) -> None:
        folder.settings |= values
        folder.write()

    return put, code, said or next(iter(values))


def no_setting(name: str) -> Callable[[Folder], None]:
    def take(folder: Folder) -> None:
        folder.settings.pop(name, None)
        folder.write()

    return take


def bias(name: str) -> Callable[[Folder], None]:
    """Of layers that may have one."""

    def put(folder: Folder) -> None:
        folder.settings |= {"model_type": "llama", name: True}
        folder.write()

    return put


def window(**values: Any) -> Callable[[Folder], None]:
    def put(folder: Folder) -> None:
        ours = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")
        folder.settings = {
            name: value
            for name, value in folder.settings.items()
            # What is null in one architecture may not be in another.
            if name not in ours and value is not None
        } | values
        folder.write()

    return put


def sliding_layers(folder: Folder) -> None:
    folder.settings |= {"layer_types": ["sliding_attention"] * folder.layers, "sliding_window": 4}
    folder.write()


def half_rotated(folder: Folder) -> None:
    folder.settings |= {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "partial_rotary_factor": 0.5,
    }
    folder.write()


def rope(where: str, **values: Any) -> Callable[[Folder], None]:
    def put(folder: Folder) -> None:
        for name in ("rope_scaling", "partial_rotary_factor"):
            folder.settings.pop(name, None)
        folder.settings |= {where: values}
        folder.write()

    return put


def any_tensor(change: Callable[[dict[str, Tensor], str], None]) -> Callable[[Folder], None]:
    """Change one that must be there."""

    def put(folder: Folder) -> None:
        needed = [name for name in folder.tensors if name.startswith("model.layers.0.mlp")]
        change(folder.tensors, folder.rng.choice(needed))
        folder.write()

    return put


def replaced(name: str, **values: Any) -> Callable[[dict[str, Tensor], str], None]:
    """By what a method of tensors returns."""

    def change(tensors: dict[str, Tensor], which: str) -> None:
        tensors[which] = getattr(tensors[which], name)(**values)

    return change


def shards(change: Callable[[Folder, list[Path]], None]) -> Callable[[Folder], None]:
    """Change something about the files of two shards."""

    def put(folder: Folder) -> None:
        folder.files, folder.place = 2, ""
        folder.write()
        change(folder, sorted(folder.path.glob("model-*")))

    return put


def forget(folder: Folder, files: list[Path]) -> None:
    """The index names a tensor that its shard does not hold."""
    index = json.loads((folder.path / INDEX).read_text())
    index["weight_map"]["model.layers.0.mlp.other.weight"] = files[0].name
    (folder.path / INDEX).write_text(json.dumps(index))


def another(folder: Folder, files: list[Path]) -> None:
    """The last shard holds a tensor of the first, with other values."""
    first, last = (load_file(file) for file in files)
    which = min(first.keys() - {"lm_head.weight"})
    index = json.loads((folder.path / INDEX).read_text())
    index["weight_map"][which] = str(files[0].relative_to(folder.path))
    (folder.path / INDEX).write_text(json.dumps(index))
    save_file(last | {which: first[which] + 1}, files[1])


def not_finite(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name].view(-1)[-1] = float("nan")


def nested(folder: Folder) -> None:
    (folder.path / "config.json").write_text("[" * 100_000)


def adapter(folder: Folder) -> None:
    (folder.path / "adapter_config.json").write_text("{}")


FLAWS: dict[str, Flaw] = {
    "architecture": setting(model_type="gpt2", said="type gpt2 cannot be adopted"),
    "no architecture": (no_setting("model_type"), 2, "type None cannot be adopted"),
    "list of architectures": setting(model_type=[], said="type [] cannot be adopted"),
    "object for an architecture": setting(model_type={}, said="type {} cannot be adopted"),
    "another configuration": setting(
        configuration_files=["config.4.0.0.json"], said="transformers refuses it"
    ),
    "brackets": (nested, 2, "config.json cannot be read"),
    "no channels": setting(head_dim=0, said="model.head_dim"),
    "activation": setting(hidden_act="gelu"),
    "tanh": setting(hidden_act="gelu_pytorch_tanh"),
    "attention_bias": (bias("attention_bias"), 2, "attention_bias; allowed"),
    "mlp_bias": (bias("mlp_bias"), 2, "mlp_bias; allowed"),
    "window": (window(model_type="mistral", sliding_window=4), 2, "sliding_window 4"),
    "default window": (window(model_type="mistral"), 2, "sliding_window 4096, transformers' value"),
    "window of llama": (window(model_type="llama", sliding_window=4), 2, "sliding_window 4"),
    "window of later layers": (
        window(model_type="qwen3", sliding_window=4, use_sliding_window=True, max_window_layers=0),
        2,
        "layer_types sliding_attention",
    ),
    "layer types": (sliding_layers, 2, "layer_types sliding_attention"),
    "dynamic": (rope("rope_scaling", type="dynamic", factor=2.0), 2, "dynamic"),
    "longrope": (
        rope("rope_scaling", rope_type="longrope", short_factor=[1.0], long_factor=[2.0]),
        2,
        "longrope",
    ),
    "new longrope": (
        rope("rope_parameters", rope_type="longrope", short_factor=[1.0], long_factor=[2.0]),
        2,
        "longrope",
    ),
    "half of it scaled": (half_rotated, 2, "partial_rotary_factor 0.5 with rope_type linear"),
    "unknown scaling": (
        rope("rope_scaling", rope_type="linear", factor=2.0, mrope_section=[1]),
        2,
        "unknown parameters: mrope_section",
    ),
    "list of scalings": (rope("rope_scaling", rope_type=["x"]), 2, "of type ['x']"),
    "no base": (rope("rope_parameters", rope_theta=None), 2, "rope_theta of the rotary"),
    "text for a base": (rope("rope_parameters", rope_theta="10000"), 2, "allowed a number"),
    "text for a factor": (
        rope("rope_scaling", type="linear", factor="2"),
        2,
        "allowed a number",
    ),
    "unknown rope": (rope("rope_parameters", rope_type="spiral"), 2, "spiral"),
    "quantised": setting(quantization_config={"quant_method": "fp8"}),
    "layers apart": setting(per_layer_config={"0": {"hidden_act": "gelu"}}),
    "both directions": setting(is_causal=False),
    "named weights": setting(transformers_weights="other.safetensors"),
    "adapter": (adapter, 2, "adapter_config.json"),
    "text for a number": setting(num_attention_heads="four", said="transformers refuses it"),
    # 8 channels a head where none are given: of 25 transformers complains first.
    "odd heads": setting(
        hidden_size=40, num_attention_heads=5, num_key_value_heads=2, said="heads"
    ),
    "missing": (any_tensor(dict.pop), 2, "the tensors do not fit config.json: no model.layers.0"),
    "too many": (
        any_tensor(lambda tensors, name: tensors.update({f"{name}.more": torch.ones(1)})),
        2,
        "too many",
    ),
    "shape": (any_tensor(lambda t, n: t.update({n: t[n][:-1].contiguous()})), 2, ", not ["),
    "not finite": (any_tensor(not_finite), 6, "holds NaN or infinity"),
    "float64": (any_tensor(replaced("double")), 2, "is F64; allowed"),
    "float8": (any_tensor(replaced("to", dtype=torch.float8_e4m3fn)), 2, "is F8_E4M3; allowed"),
    "int8": (any_tensor(replaced("to", dtype=torch.int8)), 2, "is I8; allowed"),
    "no shard": (shards(lambda _, files: files[1].unlink()), 6, "is missing or damaged"),
    "half a shard": (
        shards(lambda _, files: files[0].write_bytes(files[0].read_bytes()[:-9])),
        6,
        "is missing or damaged",
    ),
    "another": (shards(another), 6, "is another in"),
    "forgotten": (shards(forget), 6, "which model.safetensors.index.json says it holds"),
    "empty index": (
        shards(lambda folder, _: (folder.path / INDEX).write_text("{}")),
        6,
        "weight_map names no files",
    ),
    "no weights": (shards(lambda folder, _: (folder.path / INDEX).unlink()), 2, "holds neither"),
}
"""Of a drawn folder: how it is put in, the exit code of adopting it, and what must be said."""
