"""One fp32 sum of the key and value gradients of all sparse layers that read one K and V.

Through autograd alone every layer would write its dK and dV in full, rounded to the layers' dtype,
and autograd would add them up pairwise. Here each layer's backward adds to two fp32 buffers, and
the producer of K and V gets the sum once.

Shapes: B batch, S sequence, HKV KV groups, D query/key head dim, DV value head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class KeyValueGradients:
    """The sum; one object per forward of an oracle (and, with pipelining, per microbatch).

    ```
    gradients = KeyValueGradients()
    key, value = gradients.attach(key, value)  # for all consumers
    for layer in sparse_layers:
        output = block_sparse_attention(..., key, value, ..., accumulate=gradients)
    ```

    A consumer keeps its edge to `attach` in autograd's graph but sends no gradient along it.
    Autograd runs a node only after everything that depends on its outputs has run, so that the
    backward of `attach` finds the sum complete, whichever consumers took part; what others, such
    as the oracle itself, send through autograd is added to it. It then frees the buffers.

    Consumers may run again in an activation recompute, as it is their backward that adds, and each
    has one. The order of the additions is that of autograd's backward: results repeat bit for bit.
    Consumers that a process boundary or a `detach` separates from `attach` must not accumulate.
    """

    def __init__(self) -> None:
        self._attached = False
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    def attach(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`key` [B,S,HKV,D] and `value` [B,S,HKV,DV], for the consumers; no copies."""
        self.claim()
        return _Attach.apply(key, value, self)

    def claim(self) -> None:
        """Promise to `collect` in the backward of what makes key and value, as `attach` does."""
        self._attached = True

    def check_attached(self) -> None:
        """Raises ValueError before `attach`, as nothing would ever collect the gradients."""
        if not self._attached:
            raise ValueError(
                "accumulate: got KeyValueGradients that nothing collects, expected key and value"
                " from its attach(key, value)"
            )

    def buffers(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Contiguous fp32 [B,S,HKV,D] and [B,S,HKV,DV] (fp64 for fp64), and whether to add.

        The first to ask must write every element, as the buffers are not initialised; all others
        must add. B and S may differ between callers as long as B * S does not.
        """
        add = self._key is not None and self._value is not None
        if self._key is None or self._value is None:
            dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
            self._key = key.new_empty(key.shape, dtype=dtype)
            self._value = value.new_empty(value.shape, dtype=dtype)
        return self._key.view(key.shape), self._value.view(value.shape), add

    def add(self, grad_key: Tensor, grad_value: Tensor) -> None:
        """Add gradients [B,S,HKV,D] and [B,S,HKV,DV] of any dtype."""
        key, value, add = self.buffers(grad_key, grad_value)
        for total, gradient in ((key, grad_key), (value, grad_value)):
            if add:
                total += gradient
            else:
                total.copy_(gradient)

    def collect(self, *others: Tensor | None) -> list[Tensor | None]:
        """The sums of key and value with `others`, which came through autograd; frees the buffers.

        In fp32 (fp64 for fp64); what nobody added to is the other as it came.
        """
        sums = self._key, self._value
        self._key = self._value = None
        results = []
        for total, other in zip(sums, others, strict=True):
            if total is not None and other is not None:
                other = total.view(other.shape).add_(other)
            results.append(total if other is None else other)
        return results


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, gradients: KeyValueGradients
    ) -> tuple[Tensor, Tensor]:
        ctx.gradients = gradients
        ctx.like = tuple((tensor.shape, tensor.dtype) for tensor in (key, value))
        # Otherwise what consumers do not send would arrive as tensors of zeros.
        ctx.set_materialize_grads(False)
        return key.view_as(key), value.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        sums = ctx.gradients.collect(*others)
        return *(
            None if total is None else total.view(shape).to(dtype)
            for total, (shape, dtype) in zip(sums, ctx.like, strict=True)
        ), None
