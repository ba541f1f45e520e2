"""Pipeline communication of tensors whose width differs from cut to cut.

megatron-core's schedules send one tensor of one shape over every cut. A cut inside a hybrid block
sends more: key, value and block indices ride along in the last dimension. megatron-core would ask
the neighbour for the shape before every tensor; here every rank knows all shapes beforehand, so the
question is answered from a table without communication.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from hysparse_megatron.architecture.stages import PipelinePlan
from hysparse_megatron.model.megatron_config import HySparseConfig
from hysparse_megatron.runtime.rendezvous import current_timeout

_NOTHING = [0, 0, 0]


class PayloadCommunicator(P2PCommunicator):
    """Knows the shape of every tensor this rank will receive, in order."""

    def __init__(
        self, pp_group: dist.ProcessGroup, config: HySparseConfig, rows: int, batch: int
    ) -> None:
        """`rows` x `batch` tokens of the residual stream on this rank per micro-batch."""
        table_config = copy.copy(config)
        table_config.variable_seq_lengths = True  # makes the base class ask _communicate_shapes
        self._bounded = dist.get_backend(pp_group) == "gloo"
        if self._bounded:
            table_config.batch_p2p_comm = False  # a batch cannot be waited for with a timeout
        super().__init__(pp_group, table_config)
        self._widths = [config.payload_width(stage) for stage in range(len(config.plan.stages))]
        self._plan = config.plan
        self._shape = [rows, batch]
        self._group_size = config.microbatch_group_size_per_vp_stage
        self._forward: Iterator[int] = iter(())
        self._backward: Iterator[int] = iter(())

    def begin(self, num_microbatches: int) -> None:
        """Prepare for one call of the schedule with `num_microbatches`."""
        forward, backward = receive_order(
            self._plan, self.pp_group.rank(), num_microbatches, self._group_size
        )
        self._forward = iter([self._widths[stage] for stage in forward])
        self._backward = iter([self._widths[stage + 1] for stage in backward])

    def _communicate_shapes(  # type: ignore[override]
        self, tensor_send_next, tensor_send_prev, recv_prev, recv_next
    ) -> tuple[list[int], list[int]]:
        """Shapes of the next tensors from the previous and the next stage, without asking."""
        return (
            [*self._shape, next(self._forward)] if recv_prev else _NOTHING,
            [*self._shape, next(self._backward)] if recv_next else _NOTHING,
        )

    def _communicate(self, *, wait_on_reqs: bool = True, **tensors: Any) -> Any:
        """Sends and receives; whoever waits, waits no longer than the timeout of now."""
        if not self._bounded:  # NCCL keeps to the timeout by itself
            return super()._communicate(wait_on_reqs=wait_on_reqs, **tensors)
        previous, following, requests = super()._communicate(wait_on_reqs=False, **tensors)
        bounded = {name: _Bounded(request) for name, request in requests.items()}
        if wait_on_reqs:
            for request in bounded.values():
                request.wait()
        return previous, following, None if wait_on_reqs else bounded


class _Bounded:
    """A request of gloo's, which by itself waits as long as its group was made to."""

    def __init__(self, request: dist.Work) -> None:
        self._request = request

    def wait(self) -> None:
        """Raise RuntimeError if the neighbour does not come within the timeout."""
        self._request.wait(current_timeout())


def receive_order(
    plan: PipelinePlan, pp_rank: int, num_microbatches: int, group_size: int | None
) -> tuple[list[int], list[int]]:
    """The stages whose inputs, and the stages whose output gradients, a rank receives, in order."""
    chunks = plan.num_chunks
    if chunks == 1:
        order = [0] * num_microbatches
    else:
        table = get_schedule_table(num_microbatches, chunks, group_size)
        order = [chunk for _, chunk in table]
    if pp_rank > 0:
        forward = order
    else:  # the first rank takes over from the last one, which is a chunk behind
        forward = [chunk + 1 for chunk in order if chunk < chunks - 1]
    reverse = [chunks - 1 - chunk for chunk in order]
    if pp_rank < plan.pp - 1:
        backward = reverse
    else:  # the last rank's outputs go to the first rank's next chunk
        backward = [chunk - 1 for chunk in reverse if chunk > 0]
    return (
        [plan.stage_index(pp_rank, chunk) for chunk in forward],
        [plan.stage_index(pp_rank, chunk) for chunk in backward],
    )


def describe_traffic(config: HySparseConfig, rows: int, batch: int) -> str:
    """One line per cut: bytes that one rank sends per micro-batch and direction."""
    element = config.pipeline_dtype.itemsize
    lines = []
    for stage in range(1, len(config.plan.stages)):
        width = config.payload_width(stage)
        total, plain = (rows * batch * element * w for w in (width, config.hidden_size))
        oracle = config.plan.oracle_into(stage)
        extra = (
            "hidden state only"
            if oracle is None
            else f"hidden state {plain:,}, key, value, indices of oracle {oracle} {total - plain:,}"
        )
        lines.append(
            f"cut before layer {config.plan.stages[stage].start}: {total:,} bytes per micro-batch "
            f"and direction from each rank ({extra})"
        )
    return "\n".join(lines)
