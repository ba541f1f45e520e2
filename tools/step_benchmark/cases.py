"""What is measured: one layout at one length, its configuration and what the planner says of it."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from dataclasses import dataclass
from functools import cached_property

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import Config, Precision
from hysparse_megatron.config.validate import check
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.plan.memory import RankMemory
from hysparse_megatron.plan.overview import Overview, make_overview

from .slices import MEGATRON, block_length, default_layers, is_all_full, slice_layout
from .splits import ONE, Split

_SCHEDULE_STEPS = 1_000_000
"""Length of the run that a slice pretends to begin: longer than any warm-up and decay."""


@dataclass(frozen=True)
class Case:
    """One layout at one length, on one device or split over several."""

    name: str
    config: Config
    split: Split = ONE
    again: bool = False
    """Whether it was measured before: how much the clocks drifted since then."""

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.config.train.seq_length

    @property
    def label(self) -> str:
        """The name in tables."""
        split = "" if self.split == ONE else f" {self.split}"
        return f"{self.name}{split} again" if self.again else f"{self.name}{split}"

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.config.train.global_batch_size * self.length

    @cached_property
    def overview(self) -> Overview:
        """The plan of this very configuration."""
        return make_overview(self.config, world_size=self.split.ranks)

    @property
    def flops_per_token(self) -> float:
        """Of a training step, what is recomputed included, as the planner counts them."""
        return self.overview.training_flops_per_token

    @property
    def planned_tokens_per_second(self) -> float:
        """By the planner, which knows links only if `cluster` is set: a ratio to another case says
        more than the number."""
        return self.tokens / self.overview.time.seconds

    @property
    def memory(self) -> RankMemory:
        """What the planner expects at the peak."""
        return self.overview.ranks[0].memory


def make_cases(options: Namespace) -> list[Case]:
    """All cases in the order of measurement: length by length, the first layout again at the end.

    Raises one ConfigError for whatever no case could run with.
    """
    cases: list[Case] = []
    names = [*options.layouts, *([MEGATRON] if options.reference else [])]
    for length in options.lengths:
        of_length = [
            Case(name, slice_config(options, name, length, split=split), split)
            for split in options.splits
            for name in names
        ]
        cases += of_length
        if options.repeat and len(of_length) > 1:
            cases.append(dataclasses.replace(of_length[0], again=True))
    return cases


def slice_config(
    options: Namespace, name: str, length: int, more: tuple[str, ...] = (), split: Split = ONE
) -> Config:
    """The validated configuration of one slice; `more` overrides come after the user's."""
    model_layout = compose([f"model={options.model}"]).model.layout
    try:
        block_length(model_layout)
    except ValueError as error:
        if not is_all_full([name]) or options.layers is None:
            message = f"--model {options.model}: {error}; name a hysparse preset"
            raise ConfigError(message) from error
    num_layers = options.layers or default_layers(model_layout)
    overrides = [
        f"model={options.model}",
        f"model.layout={slice_layout(model_layout, name, num_layers)}",
        f"train.seq_length={length}",
        "train.micro_batch_size=1",
        f"train.steps={_SCHEDULE_STEPS}",
        f"train.precision={_precision(options.device).value}",
    ]
    if options.experts is not None:
        overrides.append(f"model.moe.num_experts={options.experts}")
    if options.vocab is not None:
        overrides.append(f"model.vocab_size={options.vocab}")
    if options.device == "cuda":  # by which the planner knows that activations are fused
        overrides.append(f"cluster.peak_tflops={options.peak_tflops}")
    config = compose([*overrides, *split.overrides, *options.set, *more])
    if config.model.vocab_size is None:
        raise ConfigError(f"model.vocab_size: got null; give --vocab, {options.model} has none")
    batch = options.micro_batches * config.train.micro_batch_size * split.dp
    train = dataclasses.replace(config.train, global_batch_size=batch)
    config = dataclasses.replace(config, train=train)
    check(config, world_size=split.ranks)
    if name == MEGATRON:
        _check_reference(config)
    return config


def _precision(device: str) -> Precision:
    """What training uses there; a CPU only shows that the command works."""
    return Precision.bf16 if device == "cuda" else Precision.fp32


def _check_reference(config: Config) -> None:
    """Raise ConfigError for what megatron-core's own attention does not have."""
    model = config.model
    if model.value_dim != model.head_dim:
        raise ConfigError("--reference: megatron-core's attention has one head dim for all")
    if model.moe.num_experts and model.moe.num_dense_first_layers:
        raise ConfigError("--reference: all layers must be alike, so num_dense_first_layers is 0")
    if model.full_gate.value != "none":
        raise ConfigError("--reference: megatron-core's attention has no such gate as full_gate")
