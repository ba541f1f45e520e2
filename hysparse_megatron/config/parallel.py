"""Settings of how a model is split over ranks, and of what these send each other when."""

from dataclasses import dataclass, field
from typing import Any

from hysparse_megatron.architecture.bounds import at_least


@dataclass(frozen=True, kw_only=True)
class OverlapConfig:
    """What data-parallel ranks send each other beside computing; off, it is sent between steps."""

    grad_reduce: bool = True
    """Reduce gradients beside the backward pass of a step's last micro-batch, bucket by bucket."""
    param_gather: bool = True
    """Gather updated parameters beside the next forward pass, bucket by bucket."""
    bucket_size: int | None = at_least(1, default=None)
    """Parameters that are sent together, at least; null: 40 million, or a million for each
    data-parallel rank if that is more. Only a pipeline's first rank has several buckets: the others
    send while those before them still compute. With Muon all matrices go together."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is split over ranks; what remains of the world size is data parallel."""

    tp: int = at_least(1, default=1)
    """Tensor-parallel size: ranks that share every layer's heads and feed-forward channels."""
    pp: int = at_least(1, default=1)
    """Pipeline-parallel size: ranks that hold different layers."""
    vpp: int | None = at_least(2, default=None)
    """Model chunks per pipeline rank (interleaving, at least 2); null means one chunk."""
    cp: int = at_least(1, default=1)
    """Context-parallel size: ranks that share one sequence, of which each holds two chunks. Keys
    and values of a hybrid block are gathered once, those of other full layers in every layer."""
    cp_keep_kv: bool = True
    """Keep the gathered keys and values of every hybrid block for the backward pass; false: keep
    this rank's part, and gather once more per block, before its backward pass."""
    ep: int = at_least(1, default=1)
    """Expert-parallel size: ranks that share the experts of a layer; they are taken from the
    tensor- and data-parallel ranks of a stage, so they add nothing to the world size. An expert is
    never split."""
    sequence_parallel: bool = False
    """Also split the residual stream over the tensor-parallel ranks, along the sequence."""
    timeout_seconds: int = at_least(1, default=600)
    """How long ranks wait for each other, at the start and in every collective, before all of them
    end with an error."""
    setup_timeout_seconds: int = at_least(1, default=3600)
    """The same from the start until the first step is done: data may be prepared on one rank, and
    kernels compiled, while the others wait."""
    grad_reduce_in_fp32: bool = True
    """Sum gradients over micro-batches and ranks in fp32; false: in `train.precision`, which halves
    their memory and traffic with bf16 and rounds each addition."""
    num_distributed_optimizer_instances: int = at_least(1, default=1)
    """Groups of data-parallel ranks that each hold a whole optimizer state. Gradients are
    reduce-scattered and parameters gathered within a group; between groups a rank's share of the
    gradients is all-reduced and nothing else: for groups with fast links inside, as of a rack."""
    overlap: OverlapConfig = field(default_factory=OverlapConfig)


_OF_ANY_SPLIT = ("timeout_seconds", "setup_timeout_seconds", "grad_reduce_in_fp32", "overlap")


def resized(parallel: ParallelConfig, **sizes: Any) -> ParallelConfig:
    """Another split of the same run. Of `parallel` stays what fits any; all else has its default.

    A setting is listed here when it can be with any sizes, so that a new one is left out first.
    """
    kept = {name: getattr(parallel, name) for name in _OF_ANY_SPLIT}
    return ParallelConfig(**kept, **sizes)
