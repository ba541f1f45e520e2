"""Rules of the architecture."""

from collections.abc import Iterator

from hysparse_kernels import limits

from hysparse_megatron.architecture.layout import Layout, LayoutError, parse_layout
from hysparse_megatron.architecture.model import Backend
from hysparse_megatron.architecture.rope import RopeType, rope_problems
from hysparse_megatron.architecture.stages import check_stages
from hysparse_megatron.config.rules.multiples import is_multiple
from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import Problem


def layout(config: Config) -> Iterator[Problem]:
    """The layout can be read and cut into the stages."""
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


def heads(config: Config) -> Iterator[Problem]:
    """Heads and groups can be split over tensor-parallel ranks."""
    model, tp = config.model, config.parallel.tp
    heads, groups = model.num_attention_heads, model.num_query_groups
    if not is_multiple(heads, tp):
        yield Problem("model.num_attention_heads", str(heads), f"a multiple of parallel.tp = {tp}")
    if not is_multiple(heads, groups):
        allowed = f"a multiple of model.num_query_groups = {groups}"
        yield Problem("model.num_attention_heads", str(heads), allowed)
    if not (is_multiple(groups, tp) or is_multiple(tp, groups)):
        allowed = f"a multiple or a divisor of parallel.tp = {tp}"
        yield Problem("model.num_query_groups", str(groups), allowed)
    elif 0 < groups < tp:
        for key, width in (("head_dim", model.head_dim), ("value_head_dim", model.value_dim)):
            if not is_multiple(groups * width, tp):
                got = f"{width} ({groups} groups x {width} channels)"
                allowed = f"groups x channels that are a multiple of parallel.tp = {tp}"
                yield Problem(f"model.{key}", got, allowed)


def widths(config: Config) -> Iterator[Problem]:
    """Channels can be split over tensor-parallel ranks."""
    model, tp = config.model, config.parallel.tp
    for key in ("hidden_size", "ffn_hidden_size"):
        width = getattr(model, key)
        if not is_multiple(width, tp):
            yield Problem(f"model.{key}", str(width), f"a multiple of parallel.tp = {tp}")


def rotary(config: Config) -> Iterator[Problem]:
    """How much of a head is rotated, and by which frequencies."""
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


def selection(config: Config) -> Iterator[Problem]:
    """Blocks fit the sequence, and forced blocks the selection."""
    model, seq_length = config.model, config.train.seq_length
    if model.block_size > seq_length > 0:
        allowed = f"at most train.seq_length = {seq_length}"
        yield Problem("model.block_size", str(model.block_size), allowed)
    forced = model.forced_first_blocks + model.forced_recent_blocks
    if forced > model.num_selected_blocks > 0:
        got = f"{model.forced_first_blocks} + {model.forced_recent_blocks} recent"
        allowed = f"at most model.num_selected_blocks = {model.num_selected_blocks} in sum"
        yield Problem("model.forced_first_blocks", got, allowed)


def backend(config: Config) -> Iterator[Problem]:
    """What the Triton kernels take; whether there is a GPU is found out when the run starts."""
    if config.model.backend is not Backend.triton:
        return
    model = config.model
    precision = config.train.precision.value
    if precision not in limits.DTYPES:
        allowed = f"auto or reference with train.precision={precision}"
        yield Problem("model.backend", "triton", allowed)
    if _selects(config):
        yield from _block_size(config)
    for key, width in (("head_dim", model.head_dim), ("value_head_dim", model.value_dim)):
        if width > limits.MAX_HEAD_DIM:
            allowed = f"at most {limits.MAX_HEAD_DIM} with model.backend=triton"
            yield Problem(f"model.{key}", str(width), allowed)


def _selects(config: Config) -> bool:
    """Whether a layer reads selected blocks; not in a layout that cannot be read."""
    try:
        return parse_layout(config.model.layout).selects
    except LayoutError:
        return False  # `model.layout` has said so


def _block_size(config: Config) -> Iterator[Problem]:
    """That the Triton kernels take it."""
    model = config.model
    if model.block_size not in limits.BLOCK_SIZES:
        allowed = f"one of {', '.join(map(str, limits.BLOCK_SIZES))} with model.backend=triton"
        yield Problem("model.block_size", str(model.block_size), allowed)
    *_, shorter, longest = limits.BLOCK_SIZES
    widest = limits.LONGEST_BLOCK_MAX_HEAD_DIM
    if model.block_size == longest and max(model.head_dim, model.value_dim) > widest:
        allowed = f"at most {shorter} with model.backend=triton and heads wider than {widest}"
        yield Problem("model.block_size", str(longest), allowed)
