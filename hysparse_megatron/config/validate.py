"""Checks that need more than one setting's type. All mistakes are reported at once.

Every rule is one small generator of problems. A rule that needs a sane number leaves the
complaint about it to `_numbers`, so that one mistake is reported once.
"""

import importlib.metadata
import importlib.util
import math
import netrc
import os
import re
from collections.abc import Callable, Iterator
from operator import attrgetter

from hysparse_kernels import limits

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.layout import Layout, LayoutError, parse_layout
from hysparse_megatron.architecture.model import Backend, Balancing, Fp8, Layers, RouterScore
from hysparse_megatron.architecture.rope import RopeType, rope_problems
from hysparse_megatron.architecture.stages import check_stages, stage_layers
from hysparse_megatron.config import paths
from hysparse_megatron.config.blend import parse_blend
from hysparse_megatron.config.cluster import cluster_problems
from hysparse_megatron.config.problems import as_error
from hysparse_megatron.config.schema import (
    VALIDATION,
    Config,
    OptimizerName,
    Precision,
    Recompute,
    TrackingMode,
)
from hysparse_megatron.config.skips import Skips
from hysparse_megatron.errors import Problem

FP8_UNIT = 16
"""Rows and columns of an FP8 matrix come in multiples of this."""

AT_LEAST: dict[str, int] = {
    "model.hidden_size": 1,
    "model.ffn_hidden_size": 1,
    "model.num_attention_heads": 1,
    "model.num_query_groups": 1,
    "model.head_dim": 1,
    "model.value_head_dim": 1,
    "model.vocab_size": 1,
    "model.block_size": 1,
    "model.num_selected_blocks": 1,
    "model.window": 1,
    "model.forced_first_blocks": 0,
    "model.forced_recent_blocks": 0,
    "model.rope_scaling.original_max_position_embeddings": 1,
    "model.moe.num_experts": 0,
    "model.moe.num_active_experts": 1,
    "model.moe.expert_ffn_hidden_size": 1,
    "model.moe.shared_expert_ffn_hidden_size": 0,
    "model.moe.num_dense_first_layers": 0,
    "model.moe.aux_loss_coefficient": 0,
    "model.moe.bias_update_rate": 0,
    "model.moe.z_loss_coefficient": 0,
    "parallel.tp": 1,
    "parallel.pp": 1,
    "parallel.vpp": 2,
    "parallel.cp": 1,
    "parallel.ep": 1,
    "cluster.gpus_per_node": 1,
    "cluster.nodes": 1,
    "cluster.ranks_per_node": 1,
    "cluster.slurm.cpus_per_task": 1,
    "cluster.slurm.signal_seconds": 1,
    "cluster.slurm.max_restarts": 0,
    "parallel.timeout_seconds": 1,
    "parallel.setup_timeout_seconds": 1,
    "optim.min_learning_rate": 0,
    "optim.weight_decay": 0,
    "optim.clip_grad": 0,
    "optim.warmup_steps": 0,
    "optim.decay_steps": 0,
    "optim.muon.num_ns_steps": 1,
    "train.steps": 1,
    "train.global_batch_size": 1,
    "train.micro_batch_size": 1,
    "train.seq_length": 2,
    "train.seed": 0,
    "train.eval_interval": 0,
    "train.eval_batches": 0,
    "train.guard.max_bad_steps": 1,
    "train.guard.spike_window": 0,
    "data.tokenizer_vocab_size": 1,
    "checkpoint.interval": 1,
    "checkpoint.keep": 0,
    "checkpoint.keep_every": 0,
    "checkpoint.step": 1,
    "tracking.log_interval": 1,
    "tracking.straggler_interval": 1,
}
"""Smallest value of a number; null passes where the type allows it."""

ABOVE_ZERO = (
    "model.rotary_base",
    "model.rope_scaling.attention_factor",
    "model.norm_epsilon",
    "model.init_std",
    "model.moe.router_scaling",
    "train.deadline_minutes",
    "train.guard.loss_spike",
    "train.guard.grad_norm_spike",
    "cluster.memory_gib",
    "cluster.peak_tflops",
    "cluster.node_bandwidth_gb",
    "cluster.network_bandwidth_gb",
    "tracking.straggler_factor",
    "optim.learning_rate",
    "optim.epsilon",
    "optim.muon.extra_scale_factor",
)

FRACTIONS = ("model.hidden_dropout", "optim.beta1", "optim.beta2", "optim.muon.momentum")
"""Numbers from 0 up to, but not including, 1."""


MUON_PACKAGE = "emerging-optimizers"
MUON_VERSIONS = "0.3"
"""The package that megatron-core takes Muon from, and its versions that are tested here."""


def check(config: Config, world_size: int) -> None:
    """Raise one `ConfigError` that lists every problem, or return."""
    problems = validate(config, world_size=world_size)
    if problems:
        raise as_error(problems)


def validate(config: Config, *, world_size: int) -> list[Problem]:
    """Everything that keeps `config` from running on `world_size` ranks."""
    problems = [problem for rule in RULES for problem in rule(config)]
    problems += _ranks(config, world_size)
    problems += _expert_shares(config, world_size)
    problems += _batches(config, world_size)
    return problems


def plan_problems(config: Config, *, world_size: int) -> list[Problem]:
    """What of `validate` is about how the model is split over ranks."""
    problems = [problem for rule in PLAN_RULES for problem in rule(config)]
    problems += _ranks(config, world_size)
    problems += _expert_shares(config, world_size)
    problems += _batches(config, world_size)
    return problems


def warnings(config: Config) -> list[str]:
    """What will not stop the run but will probably surprise."""
    if config.tracking.mode is TrackingMode.online and not has_wandb_key():
        return [
            "tracking.mode is online, but there is no WANDB_API_KEY and no `wandb login`: "
            "the run will track offline instead"
        ]
    return []


def _numbers(config: Config) -> Iterator[Problem]:
    for key, smallest in AT_LEAST.items():
        value = attrgetter(key)(config)
        if value is not None and not smallest <= value < math.inf:
            yield Problem(key, str(value), f"at least {smallest}")
    for key in ABOVE_ZERO:
        value = attrgetter(key)(config)
        if value is not None and not 0 < value < math.inf:
            yield Problem(key, str(value), "a number above 0")
    for key in FRACTIONS:
        value = attrgetter(key)(config)
        if not 0 <= value < 1:
            yield Problem(key, str(value), "at least 0 and below 1")
    held_out = config.data.validation_fraction
    if not (0 < held_out < 1 or held_out == config.train.eval_batches == 0):
        allowed = "above 0 and below 1; 0 with train.eval_batches=0"
        yield Problem("data.validation_fraction", str(held_out), allowed)


def _name(config: Config) -> Iterator[Problem]:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", config.name):
        allowed = "letters, digits, dots, dashes and underscores, not starting with a dot or dash"
        yield Problem("name", repr(config.name), allowed)


def _layout(config: Config) -> Iterator[Problem]:
    text, parallel = config.model.layout, config.parallel
    try:
        layout: Layout = parse_layout(text)
    except LayoutError as error:
        yield Problem("model.layout", repr(text), f"the layout language: {error}")
        return
    chunks = parallel.vpp or 1
    if parallel.pp < 1 or chunks < 1:
        return
    try:
        check_stages(layout, parallel.pp * chunks)
    except LayoutError as error:
        stages = f"parallel.pp = {parallel.pp} x parallel.vpp = {chunks} stages"
        yield Problem("model.layout", repr(text), f"what fits {stages}: {error}")


def _heads(config: Config) -> Iterator[Problem]:
    model, tp = config.model, config.parallel.tp
    heads, groups = model.num_attention_heads, model.num_query_groups
    if not _is_multiple(heads, tp):
        yield Problem("model.num_attention_heads", str(heads), f"a multiple of parallel.tp = {tp}")
    if not _is_multiple(heads, groups):
        allowed = f"a multiple of model.num_query_groups = {groups}"
        yield Problem("model.num_attention_heads", str(heads), allowed)
    if not (_is_multiple(groups, tp) or _is_multiple(tp, groups)):
        allowed = f"a multiple or a divisor of parallel.tp = {tp}"
        yield Problem("model.num_query_groups", str(groups), allowed)
    elif 0 < groups < tp:
        for key, width in (("head_dim", model.head_dim), ("value_head_dim", model.value_dim)):
            if not _is_multiple(groups * width, tp):
                got = f"{width} ({groups} groups x {width} channels)"
                allowed = f"groups x channels that are a multiple of parallel.tp = {tp}"
                yield Problem(f"model.{key}", got, allowed)


def _widths(config: Config) -> Iterator[Problem]:
    model, tp = config.model, config.parallel.tp
    for key in ("hidden_size", "ffn_hidden_size"):
        width = getattr(model, key)
        if not _is_multiple(width, tp):
            yield Problem(f"model.{key}", str(width), f"a multiple of parallel.tp = {tp}")


def _rotary(config: Config) -> Iterator[Problem]:
    model = config.model
    yield from rope_problems(model.rope_scaling)
    fraction, head_dim = model.rotary_fraction, model.head_dim
    if not 0 < fraction <= 1:
        yield Problem("model.rotary_fraction", str(fraction), "above 0 and at most 1")
        return
    channels = head_dim * fraction
    if head_dim > 0 and (model.rotary_dim % 2 or abs(channels - model.rotary_dim) > 1e-6):
        got = f"{fraction} ({channels:g} of {head_dim} channels)"
        yield Problem("model.rotary_fraction", got, "an even number of rotated channels")
    if model.rope_scaling.type is RopeType.yarn and 0 < model.rotary_base <= 1:
        allowed = "above 1 with model.rope_scaling.type = yarn"
        yield Problem("model.rotary_base", str(model.rotary_base), allowed)


def _selection(config: Config) -> Iterator[Problem]:
    model, seq_length = config.model, config.train.seq_length
    if model.block_size > seq_length > 0:
        allowed = f"at most train.seq_length = {seq_length}"
        yield Problem("model.block_size", str(model.block_size), allowed)
    forced = model.forced_first_blocks + model.forced_recent_blocks
    if forced > model.num_selected_blocks > 0:
        got = f"{model.forced_first_blocks} + {model.forced_recent_blocks} recent"
        allowed = f"at most model.num_selected_blocks = {model.num_selected_blocks} in sum"
        yield Problem("model.forced_first_blocks", got, allowed)


def _parallel(config: Config) -> Iterator[Problem]:
    parallel, seq_length = config.parallel, config.train.seq_length
    if parallel.cp > 1:
        yield Problem("parallel.cp", str(parallel.cp), "1: context parallel is not supported yet")
    if parallel.vpp is not None and parallel.pp == 1:
        yield Problem("parallel.vpp", str(parallel.vpp), "null while parallel.pp = 1")
    if parallel.sequence_parallel and parallel.tp == 1:
        yield Problem("parallel.sequence_parallel", "true", "false while parallel.tp = 1")
    if parallel.sequence_parallel and not _is_multiple(seq_length, parallel.tp):
        allowed = f"a multiple of parallel.tp = {parallel.tp} with parallel.sequence_parallel"
        yield Problem("train.seq_length", str(seq_length), allowed)


def _experts(config: Config) -> Iterator[Problem]:
    model, parallel = config.model, config.parallel
    moe = model.moe
    if moe.num_experts < 1:
        if parallel.ep > 1:
            allowed = "1 while model.moe.num_experts = 0: the model is dense"
            yield Problem("parallel.ep", str(parallel.ep), allowed)
        return
    if moe.num_active_experts > moe.num_experts:
        allowed = f"at most model.moe.num_experts = {moe.num_experts}"
        yield Problem("model.moe.num_active_experts", str(moe.num_active_experts), allowed)
    if moe.num_active_experts == 1 and moe.router_score is RouterScore.softmax:
        allowed = "at least 2 with softmax, whose normalised weight of one expert is always 1"
        yield Problem("model.moe.num_active_experts", "1", allowed)
    if moe.balancing is Balancing.bias and moe.router_score is not RouterScore.sigmoid:
        allowed = "another one with softmax; bias needs model.moe.router_score = sigmoid"
        yield Problem("model.moe.balancing", "bias", allowed)
    if not _is_multiple(moe.num_experts, parallel.ep):
        divisors = [str(n) for n in range(1, moe.num_experts + 1) if moe.num_experts % n == 0]
        allowed = f"a divisor of model.moe.num_experts = {moe.num_experts}: {', '.join(divisors)}"
        yield Problem("parallel.ep", str(parallel.ep), allowed)
    width = moe.shared_expert_ffn_hidden_size
    if not _is_multiple(width, parallel.tp):
        allowed = f"a multiple of parallel.tp = {parallel.tp}"
        yield Problem("model.moe.shared_expert_ffn_hidden_size", str(width), allowed)
    if parallel.tp > 1 and not parallel.sequence_parallel:
        allowed = "true with experts and parallel.tp > 1: each rank routes tokens of its own"
        yield Problem("parallel.sequence_parallel", "false", allowed)


def _dense_ranks(config: Config) -> Iterator[Problem]:
    """megatron-core's optimizer waits forever for a pipeline rank that has no experts."""
    moe, parallel = config.model.moe, config.parallel
    if moe.num_experts < 1 or moe.num_dense_first_layers < 1:
        return
    try:
        layout = parse_layout(config.model.layout)
        stages = stage_layers(layout, max(parallel.pp, 1) * max(parallel.vpp or 1, 1))
    except LayoutError:
        return  # `_layout` has said so
    for rank in range(parallel.pp):
        last = max(layer for stage in stages[rank :: parallel.pp] for layer in stage)
        if last < moe.num_dense_first_layers:
            allowed = f"at most {last}, so that every pipeline rank has a layer with experts"
            got = str(moe.num_dense_first_layers)
            yield Problem("model.moe.num_dense_first_layers", got, allowed)
            return


def _schedule(config: Config) -> Iterator[Problem]:
    optim, steps = config.optim, config.train.steps
    if optim.min_learning_rate > optim.learning_rate > 0:
        allowed = f"at most optim.learning_rate = {optim.learning_rate}"
        yield Problem("optim.min_learning_rate", str(optim.min_learning_rate), allowed)
    decay = optim.num_decay_steps(steps)
    if steps > 0 and decay >= 0 and optim.warmup_steps + decay > steps:
        got = f"{optim.warmup_steps} (and {decay} of decay)"
        allowed = f"at most train.steps = {steps} together with optim.decay_steps"
        yield Problem("optim.warmup_steps", got, allowed)


def _ramp(config: Config) -> Iterator[Problem]:
    """Whether it leads to the global batch size; `_batches` looks at the sizes on the way."""
    ramp, size = config.train.batch_ramp, config.train.global_batch_size
    if ramp is None:
        return
    if len(ramp) != 3 or min(ramp) < 1:
        allowed = "three integers of at least 1: [start,increment,samples]"
        yield Problem("train.batch_ramp", str(ramp), allowed)
    elif size > 0 and (ramp[0] >= size or (size - ramp[0]) % ramp[1]):
        allowed = f"a start below train.global_batch_size = {size} and increments that lead there"
        yield Problem("train.batch_ramp", str(ramp), allowed)


def _muon(config: Config) -> Iterator[Problem]:
    """Muon's package, which is optional; asked for without importing it."""
    if config.optim.name is not OptimizerName.muon:
        return
    try:
        installed = importlib.metadata.version(MUON_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        installed = "not installed"
    if not installed.startswith(f"{MUON_VERSIONS}."):
        got = f"muon ({MUON_PACKAGE} {installed})"
        allowed = (
            f"adamw, or muon after: pip install '{MUON_PACKAGE}~={MUON_VERSIONS}.0'\n"
            "(the extra `muon` of this package)"
        )
        yield Problem("optim.name", got, allowed)


def _tensorboard(config: Config) -> Iterator[Problem]:
    """Its package, which is optional; asked for without importing it."""
    if config.tracking.tensorboard and importlib.util.find_spec("tensorboard") is None:
        got = "true (tensorboard not installed)"
        allowed = (
            "false, or true after: pip install tensorboard\n"
            "(the extra `tensorboard` of this package)"
        )
        yield Problem("tracking.tensorboard", got, allowed)


def _whole_groups(config: Config) -> Iterator[Problem]:
    """A slice of the fused projection must hold whole KV groups, or it has no parts to split."""
    groups, tp = config.model.num_query_groups, config.parallel.tp
    splits = config.optim.name is OptimizerName.muon and config.optim.muon.split_qkv
    if splits and 0 < groups < tp:
        allowed = f"false while parallel.tp = {tp} exceeds model.num_query_groups = {groups}"
        yield Problem("optim.muon.split_qkv", "true", allowed)


def _backend(config: Config) -> Iterator[Problem]:
    """What the Triton kernels take; whether there is a GPU is found out when the run starts."""
    if config.model.backend is not Backend.triton:
        return
    model = config.model
    precision = config.train.precision.value
    if precision not in limits.DTYPES:
        allowed = f"auto or reference with train.precision={precision}"
        yield Problem("model.backend", "triton", allowed)
    if model.block_size not in limits.BLOCK_SIZES:
        allowed = f"one of {', '.join(map(str, limits.BLOCK_SIZES))} with model.backend=triton"
        yield Problem("model.block_size", str(model.block_size), allowed)
    *_, shorter, longest = limits.BLOCK_SIZES
    widest = limits.LONGEST_BLOCK_MAX_HEAD_DIM
    if model.block_size == longest and max(model.head_dim, model.value_dim) > widest:
        allowed = f"at most {shorter} with model.backend=triton and heads wider than {widest}"
        yield Problem("model.block_size", str(longest), allowed)
    for key, width in (("head_dim", model.head_dim), ("value_head_dim", model.value_dim)):
        if width > limits.MAX_HEAD_DIM:
            allowed = f"at most {limits.MAX_HEAD_DIM} with model.backend=triton"
            yield Problem(f"model.{key}", str(width), allowed)


def _data(config: Config) -> Iterator[Problem]:
    """Blends and skips that can be read; whether the datasets are there is found out later."""
    data = config.data
    if data.blend is not None:
        try:
            parse_blend(data.blend)
        except ValueError as error:
            yield Problem("data.blend", data.blend, f"weights and paths: {error}")
        for key in ("path", "tokenizer"):
            value = getattr(data, key)
            if value is not None:
                yield Problem(f"data.{key}", value, "null with data.blend: its datasets have both")
    for name in data.evaluation:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or name == VALIDATION:
            allowed = f"names of letters, digits and underscores, other than {VALIDATION}"
            yield Problem("data.evaluation", repr(name), allowed)
    if data.evaluation and config.train.eval_batches == 0:
        names = ", ".join(data.evaluation)
        yield Problem("data.evaluation", names, "nothing with train.eval_batches=0")
    try:
        Skips.parse(data.skip_steps)
    except ValueError as error:
        yield Problem("data.skip_steps", data.skip_steps, f"ascending steps: {error}")


def _cluster(config: Config) -> Iterator[Problem]:
    yield from cluster_problems(config.cluster)


def _fp8(config: Config) -> Iterator[Problem]:
    """What FP8 matrix products take; whether the GPU can do them is found out there."""
    model, train, parallel = config.model, config.train, config.parallel
    if model.fp8 is Fp8.none:
        return
    fp8 = f"model.fp8={model.fp8.value}"
    if model.layers is Layers.local:
        yield Problem("model.layers", "local", f"te or auto with {fp8}")
    if train.precision is not Precision.bf16:
        yield Problem("train.precision", train.precision.value, f"bf16 with {fp8}")
    if train.recompute is Recompute.full:
        yield Problem("train.recompute", "full", f"none or selective with {fp8}")
    tokens = train.seq_length * train.micro_batch_size
    if not _is_multiple(tokens, FP8_UNIT):
        got = f"{train.seq_length} (x train.micro_batch_size = {train.micro_batch_size})"
        yield Problem("train.seq_length", got, f"a multiple of {FP8_UNIT} tokens with {fp8}")
    widths = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size": model.ffn_hidden_size // max(parallel.tp, 1),
        "model.moe.expert_ffn_hidden_size": model.expert_width if model.moe.num_experts else 0,
        "model.num_attention_heads": _fused_width(config),
    }
    for key, width in widths.items():
        if not _is_multiple(width, FP8_UNIT):
            yield Problem(key, f"{width} columns a rank", f"a multiple of {FP8_UNIT} with {fp8}")


def _fused_width(config: Config) -> int:
    """Columns per rank of a sparse layer's input projection: queries, gates, key and value."""
    model = config.model
    groups = max(1, model.num_query_groups // max(config.parallel.tp, 1))
    heads = model.num_attention_heads // max(model.num_query_groups, 1)
    attention = model.attention(LayerKind.SPARSE)
    return groups * (heads * attention.head_rows + attention.group_rows)


def _ranks(config: Config, world_size: int) -> Iterator[Problem]:
    parallel = config.parallel
    ranks = parallel.tp * parallel.pp * parallel.cp
    if not _is_multiple(world_size, ranks):
        got = f"tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} = {ranks} ranks"
        allowed = f"a divisor of the world size, which is {world_size}"
        yield Problem("parallel.tp", got, allowed)
    ranks = parallel.ep * parallel.pp
    if config.model.moe.num_experts > 0 and not _is_multiple(world_size, ranks):
        got = f"ep {parallel.ep} x pp {parallel.pp} = {ranks} ranks"
        allowed = f"a divisor of the world size, which is {world_size}"
        yield Problem("parallel.ep", got, allowed)


def _expert_shares(config: Config, world_size: int) -> Iterator[Problem]:
    """Experts that several ranks hold although all of them are one data-parallel rank.

    megatron-core's layer-wise optimizer deals no matrices out where the data-parallel size is 1:
    each such rank would update every expert with the gradient of its own tokens alone.
    """
    parallel, moe = config.parallel, config.model.moe
    if config.optim.name is not OptimizerName.muon or moe.num_experts < 1:
        return
    dp = world_size // max(parallel.tp * parallel.pp * parallel.cp, 1)
    if dp == 1 and 0 < parallel.ep < parallel.tp:
        allowed = f"parallel.tp = {parallel.tp} with optim.name = muon and data-parallel size 1"
        yield Problem("parallel.ep", str(parallel.ep), allowed)


def _batches(config: Config, world_size: int) -> Iterator[Problem]:
    parallel, train = config.parallel, config.train
    ranks = parallel.tp * parallel.pp * parallel.cp
    if ranks < 1 or world_size % ranks:
        return
    dp = world_size // ranks
    yield from _cut(config, "train.global_batch_size", [train.global_batch_size], dp)
    if train.ramp is not None and not any(_ramp(config)):
        smaller = train.ramp.sizes(train.global_batch_size)[:-1]
        yield from _cut(config, "train.batch_ramp", smaller, dp)


def _cut(config: Config, key: str, sizes: list[int], dp: int) -> Iterator[Problem]:
    """What is wrong with the first of `sizes` that cannot be cut into micro-batches."""
    parallel, train = config.parallel, config.train
    per_pass = train.micro_batch_size * dp
    for size in sizes:
        if not _is_multiple(size, per_pass):
            unit = f"train.micro_batch_size = {train.micro_batch_size} x data-parallel size {dp}"
            yield Problem(key, str(size), f"a multiple of {unit}")
            return
        micro_batches = size // max(per_pass, 1)
        if parallel.vpp is not None and not _is_multiple(micro_batches, parallel.pp):
            got = f"{size} ({micro_batches} micro-batches on each rank)"
            allowed = f"micro-batches in multiples of parallel.pp = {parallel.pp} with parallel.vpp"
            yield Problem(key, got, allowed)
            return


def _is_multiple(value: int, unit: int) -> bool:
    """Also true where either is no positive number: `_numbers` has said so already."""
    return value < 1 or unit < 1 or value % unit == 0


def has_wandb_key() -> bool:
    """Whether W&B would find a key on this machine."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    _numbers,
    _name,
    _layout,
    _heads,
    _widths,
    _rotary,
    _selection,
    _backend,
    _fp8,
    _data,
    _cluster,
    _parallel,
    _experts,
    _dense_ranks,
    _schedule,
    _ramp,
    _muon,
    _tensorboard,
    _whole_groups,
    paths.run_directory,
    paths.inputs,
)
"""The rules that need nothing but the configuration, in the order they are reported."""

PLAN_RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    _layout,
    _heads,
    _widths,
    _parallel,
    _experts,
    _dense_ranks,
    _whole_groups,
)
"""Those that another parallel plan may satisfy."""
