"""Save what the oracles of a trained model select: `hysparse capture-selections`.

The benchmarks of the kernels read the file. With --train the run is trained first, by the project's
own command line, from the overrides given:

    hysparse capture-selections kernels/benchmarks/captured/tiny.npz --run /tmp/tiny \\
        --train model=tiny_hysparse train.steps=60

The model then reads one sample of held-out text, and the block indices of each oracle are written
with numbers that say how they compare with random and clustered ones. Needs a model without
tensor or pipeline parallelism in memory, whatever layout it was trained in.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hysparse_kernels.benchmarking.selections import Captured, describe, statistics, synthetic
from torch import Tensor

from hysparse_megatron.command import command, make_parser, positive
from hysparse_megatron.config.frozen import load_frozen
from hysparse_megatron.config.schema import Config, ParallelConfig
from hysparse_megatron.files import require_writable, writing
from hysparse_megatron.runtime.launcher import Rank
from hysparse_megatron.runtime.quiet import quiet_libraries

from .step_benchmark.attending import problem_of


@command
def main(argv: Sequence[str]) -> int:
    """Train if asked to, capture, save and describe."""
    parser = make_parser("hysparse capture-selections", __doc__)
    parser.add_argument("output", type=Path, help="file to write, .npz")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run directory")
    parser.add_argument("--sequence", type=positive, help="tokens; default: as in training")
    parser.add_argument("--train", nargs="*", metavar="OVERRIDE", help="train the run first")
    options = parser.parse_args(list(argv))
    with writing(options.output, "output"):
        options.output.parent.mkdir(parents=True, exist_ok=True)
    require_writable(options.output, "output")
    if options.train is not None:
        code = _train([*options.train, f"run_dir={options.run}"])
        if code:
            print(f"training failed with exit code {code}", file=sys.stderr)
            return code
    captured = capture(options.run, options.sequence)
    with writing(options.output, "output"):
        captured.save(options.output)
    print(f"{options.output}: {options.output.stat().st_size / 1e3:.0f} kB")
    print(json.dumps({k: v for k, v in captured.facts.items() if k != "statistics"}))
    for name, numbers in captured.facts["statistics"].items():
        print(f"  {name:10s} {describe(numbers)}")
    return 0


def _train(overrides: list[str]) -> int:
    """One process; a finished run stays as it is. What it prints is passed on."""
    command = [sys.executable, "-m", "hysparse_megatron", *overrides]
    return subprocess.run(command, check=False).returncode


def capture(run: Path, sequence: int | None) -> Captured:
    """The selections of the newest checkpoint in `run` on one sample of text."""
    # Imported late: a bad option must fail before seconds of imports.
    quiet_libraries()
    from hysparse_megatron.checkpoint import store
    from hysparse_megatron.checkpoint.state import load_state
    from hysparse_megatron.runtime import device as runtime_device
    from hysparse_megatron.training.state import build_state

    checkpoint = store.resolve(run)
    trained = load_frozen(run / "config.yaml")
    config = _alone(trained, sequence or trained.train.seq_length)
    device = runtime_device.start(Rank(0, 1, 0, 1), config.parallel)
    try:
        tokens, split, vocab_size = _sample(config)
        state = build_state(config, vocab_size, device)
        load_state(state, checkpoint, weights_only=True)
        layers, loss = _read(state.chunks[0], tokens.to(device))
    finally:
        runtime_device.stop()
    model = config.model
    path = config.data.path
    source = config.data.blend or (Path(path).name if path else "the sample text")
    facts: dict[str, Any] = {
        "model": model.layout,
        "heads": f"{model.num_attention_heads}/{model.num_query_groups}",
        "head_dims": f"{model.head_dim}/{model.value_dim}",
        "hidden_size": model.hidden_size,
        "block_size": model.block_size,
        "num_selected": model.num_selected_blocks,
        "sequence": config.train.seq_length,
        "steps": store.read_manifest(checkpoint)["step"],
        "trained_tokens": store.read_manifest(checkpoint).get("tokens"),
        "trained_sequence": trained.train.seq_length,
        "text": f"sample 0 of the {split} split of {source}",
        "loss": round(loss, 4),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "date": time.strftime("%Y-%m-%d"),
    }
    facts["statistics"] = _compared(layers, config)
    return Captured(facts, layers)


def _alone(config: Config, sequence: int) -> Config:
    """The same model in one process and one stage, for one sample of `sequence` tokens."""
    layout = config.model.layout.replace("|", " ")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, layout=layout),
        parallel=ParallelConfig(),
        train=dataclasses.replace(
            config.train, seq_length=sequence, micro_batch_size=1, global_batch_size=1
        ),
    )


def _sample(config: Config) -> tuple[Tensor, str, int]:
    """Tokens [1, S + 1] of held-out text, or of training text where that is too short."""
    from hysparse_megatron.data.sources import load_data, open_samples
    from hysparse_megatron.errors import DataError

    corpus = load_data(config.data)
    length = config.train.seq_length
    try:
        split, samples = "validation", open_samples(corpus, "validation", length)
    except DataError:
        split, samples = "training", open_samples(corpus, "train", length)
    return torch.from_numpy(samples[0])[None], split, corpus.vocab_size


def _read(model: torch.nn.Module, tokens: Tensor) -> tuple[dict[int, Tensor], float]:
    """Block indices int32 [HKV, S, K] by oracle layer, and the loss on this text, in nats."""
    from hysparse_megatron.model.attend import Projected, TrainingAttend
    from hysparse_megatron.model.sharing import SharedAttention
    from hysparse_megatron.model.stack import attending_with

    found: dict[int, Tensor] = {}

    class Kept(TrainingAttend):
        def full(self, layer: int, own: Projected) -> tuple[Tensor, SharedAttention | None]:
            output, shared = super().full(layer, own)
            if shared is not None and shared.block_indices is not None:
                found[layer] = shared.block_indices[0].cpu()
            return output, shared

    model.eval()
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(inputs.shape[1], device=tokens.device)[None]
    with torch.no_grad(), attending_with([model], Kept):
        loss = model(inputs, positions, None, labels=labels).float().mean()
    return found, float(loss)


def _compared(layers: dict[int, Tensor], config: Config) -> dict[str, dict[str, float]]:
    """`statistics` of every layer, and of synthetic selections of the same sizes."""
    problem = problem_of(config)
    result = {f"layer {layer}": statistics(ids[None]) for layer, ids in layers.items()}
    for name, clustered in (("clustered", True), ("random", False)):
        result[name] = statistics(synthetic(problem, torch.device("cpu"), clustered))
    return result


if __name__ == "__main__":
    sys.exit(main())
