"""What of the kept activations waits in host memory, and what copying it takes.

With `train.offload_activations` a layer's activations leave the device while the next layer
computes, and are back before their backward pass; see model/offload.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hysparse_megatron.architecture.stages import PipelinePlan
from hysparse_megatron.config.schema import Config

HOST_BANDWIDTH_GB = 50.0
"""GB a second of copies between a GPU and pinned memory, in each direction: PCIe 5.0 with 16 lanes
gives 53 to 55 on one GPU of an idle machine."""

ON_ITS_WAY = "on its way to or from the host"
"""Name of what copies read or write, among the kept activations."""

_STAYS = "selections"
"""Kernels hold it as lists of their own."""
_SHARED = "shared key and value"


@dataclass(frozen=True)
class HostCopies:
    """What one rank keeps on its host at the peak, and copies there and back in a step."""

    host_bytes: int
    """Of all micro-batches in flight. Pinned memory comes in powers of two: up to twice as much."""
    microbatch_bytes: int
    """In each direction, of one micro-batch."""
    step_bytes: int
    """Of all of a step."""

    @property
    def step_seconds(self) -> float:
        """What one direction takes of a step, beside computing if that takes longer."""
        return self.step_bytes / (1e9 * HOST_BANDWIDTH_GB)


def travels(config: Config, plan: PipelinePlan, layer: int, row_bytes: int) -> bool:
    """Whether a layer's activations wait on the host; `row_bytes` of the residual stream.

    Those of the model's last layer would be needed again at once.
    """
    train = config.train
    last = layer == plan.layout.num_layers - 1
    return train.offload_activations and not last and row_bytes >= train.offload_min_bytes


def leaving(kept: Counter[str]) -> Counter[str]:
    """What of the bytes that a layer keeps leaves the device."""
    return Counter({name: size for name, size in kept.items() if name != _STAYS})


def on_its_way(plan: PipelinePlan, away: list[Counter[str]], last: int | None) -> int:
    """Bytes of the device that copies read and write at most, and layers beside them.

    `away` is what leaves it of each layer of a rank, `last` what the model's last layer keeps if
    that is the rank's, and is counted elsewhere. Forwards a layer computes while those of the one
    before leave, backwards while those of the one before come. Between its passes any stage but a
    pipeline's last has those of another micro-batch's layer besides. Keys and values that layers
    share are there as long as one of their readers is.
    """
    if not away:
        return 0
    count = 2 if last is not None and plan.num_chunks == 1 else 3
    own = max(sum(kept.values()) - kept[_SHARED] for kept in away)
    shared = max(kept[_SHARED] for kept in away)
    most = max(count * own + 2 * shared - (last or 0), own + shared)
    return min(most, sum(sum(kept.values()) for kept in away))


def exposed_seconds(copies: HostCopies | None, chunks: int, forward: float, passes: float) -> float:
    """What copies make the passes of one micro-batch through one of a rank's `chunks` longer.

    Those out go beside the forward pass of `forward` seconds, those back beside the backward pass,
    which takes the rest of `passes` such times.
    """
    if copies is None:
        return 0.0
    seconds = copies.microbatch_bytes / chunks / (1e9 * HOST_BANDWIDTH_GB)
    return max(0.0, seconds - forward) + max(0.0, seconds - (passes - 1) * forward)
