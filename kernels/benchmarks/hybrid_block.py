"""The attention of a 12-layer hybrid block, forward and backward, as one measured run.

One oracle, then 11 layers of block-sparse attention on the oracle's key and value plus window
attention on their own, summed by two sigmoid gates per head. All that a real block shares is
shared: one selection, one set of lists, one key and value that collect the gradient of all layers.

The oracle makes its own selection, which is timed, but random queries select at random, as no model
does: the sparse layers read `Inputs.indices` instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import hysparse_kernels as hk
import torch
from hysparse_kernels.benchmarking.problem import Inputs
from torch import Tensor

SPARSE_LAYERS = 11
LAYERS = SPARSE_LAYERS + 1


def _own(tensor: Tensor) -> Tensor:
    """A leaf of one layer that shares memory with others; its gradient is made and dropped.

    A real layer hands it on to its projection. Added up over layers in one tensor, it would cost
    traffic that no model has.
    """
    leaf = tensor.detach().requires_grad_()
    leaf.register_post_accumulate_grad_hook(_drop_gradient)
    return leaf


def _drop_gradient(leaf: Tensor) -> None:
    leaf.grad = None


@dataclass(frozen=True)
class HybridBlock:
    """The block for some inputs."""

    inputs: Inputs
    gate: Tensor
    """[B, S, HQ, 1], what a gate projection would put out."""

    @classmethod
    def make(cls, inputs: Inputs) -> HybridBlock:
        """With random gates."""
        query = inputs.query
        shape = (*query.shape[:3], 1)
        return cls(inputs, torch.randn(shape, device=query.device, dtype=query.dtype))

    def needs_bytes(self) -> int:
        """Memory of a run with all layers at once: three outputs a layer, and room to work in."""
        return (3 * LAYERS + 8) * self.inputs.grad.nbytes

    def run(self, at_once: bool) -> None:
        """Forward and backward of the block.

        At once: all forwards, then all backwards, as in training. Else every sparse layer's
        backward follows its forward, the same work with the memory of one layer; for long
        sequences, which a model would recompute or split over devices.
        """
        inputs, problem = self.inputs, self.inputs.problem
        assert inputs.indices is not None
        query = _own(inputs.query)
        # These add up what all layers contribute.
        key, value = (x.detach().requires_grad_() for x in (inputs.key, inputs.value))
        oracle = hk.oracle_attention(
            query,
            key,
            value,
            block_size=problem.block_size,
            num_selected=problem.num_selected,
            backend=inputs.backend,
        )
        lists = hk.prepare_selection(
            inputs.indices, problem.heads, block_size=problem.block_size, backend=inputs.backend
        )
        outputs = [oracle.output]
        for _ in range(SPARSE_LAYERS):
            output = self._sparse_layer(key, value, lists)
            if at_once:
                outputs.append(output)
            else:
                torch.autograd.backward(output, inputs.grad)
        torch.autograd.backward(outputs, [inputs.grad] * len(outputs))

    def _sparse_layer(self, key: Tensor, value: Tensor, lists: hk.BlockLists | None) -> Tensor:
        """One layer with the oracle's key and value."""
        inputs, problem = self.inputs, self.inputs.problem
        assert inputs.indices is not None
        query, window_key, window_value = (_own(tensor) for tensor in inputs.leaves)
        sparse_sink, window_sink = _own(inputs.sink), _own(inputs.sink)
        sparse = hk.block_sparse_attention(
            query,
            key,
            value,
            inputs.indices,
            block_size=problem.block_size,
            sink=sparse_sink,
            lists=lists,
            backend=inputs.backend,
        )
        window = hk.sliding_window_attention(
            query,
            window_key,
            window_value,
            window=problem.window,
            sink=window_sink,
            backend=inputs.backend,
        )
        gates = (_own(self.gate) for _ in range(2))
        return hk.gated_sum(sparse, window, *gates, backend=inputs.backend)
