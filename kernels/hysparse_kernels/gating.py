"""The gated sum of the two branches of a sparse layer (P1 Eq. 8-9): specification and operation.

Shapes: B batch, S sequence, HQ query heads, DV value head dim. P1 = HySparse, arXiv 2602.03560.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hysparse_kernels.backends import resolve_backend


def gated_sum(
    first: Tensor, second: Tensor, first_gate: Tensor, second_gate: Tensor, *, backend: str = "auto"
) -> Tensor:
    """sigmoid(first_gate) * first + sigmoid(second_gate) * second, computed in fp32.

    Args:
        first, second: [B, S, HQ, DV], the outputs of the two branches, of one float dtype.
        first_gate, second_gate: logits [B, S, HQ, 1] (one gate per head) or [B, S, HQ, DV] (one per
            channel), any float dtype, any strides.
        backend: see ``resolve_backend``.

    Returns:
        [B, S, HQ, DV] in the dtype of ``first``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        BackendUnavailable: the backend cannot be used.
    """
    _check(first, second, first_gate, second_gate)
    choice = resolve_backend(backend, first.device, dtype=first.dtype, head_dim=first.shape[-1])
    if choice.name == "triton":
        from hysparse_kernels.triton import gating

        return gating.gated_sum(first, second, first_gate, second_gate)
    return reference_gated_sum(first, second, first_gate, second_gate)


def reference_gated_sum(
    first: Tensor, second: Tensor, first_gate: Tensor, second_gate: Tensor
) -> Tensor:
    """The specification: fp32 inside, fp64 for fp64 inputs."""
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    first_share, second_share = (torch.sigmoid(gate.to(wide)) for gate in (first_gate, second_gate))
    return (first_share * first + second_share * second).to(first.dtype)


def _check(first: Tensor, second: Tensor, first_gate: Tensor, second_gate: Tensor) -> None:
    if first.dim() != 4 or not first.is_floating_point():
        raise ValueError(
            f"first: got {first.dtype} {list(first.shape)}, expected a float"
            " [batch, sequence, heads, head dim]"
        )
    if second.shape != first.shape or second.dtype != first.dtype:
        raise ValueError(
            f"second: got {second.dtype} {list(second.shape)}, expected {first.dtype}"
            f" {list(first.shape)} like the first"
        )
    for name, gate in (("first_gate", first_gate), ("second_gate", second_gate)):
        if gate.shape[:-1] != first.shape[:-1] or gate.shape[-1] not in (1, first.shape[-1]):
            raise ValueError(
                f"{name}: got shape {list(gate.shape)}, expected"
                f" {[*first.shape[:-1], 1]} or {list(first.shape)}"
            )
        if not gate.is_floating_point():
            raise ValueError(f"{name}: got dtype {gate.dtype}, expected a float dtype")
    if first_gate.shape != second_gate.shape:
        raise ValueError(
            f"second_gate: got shape {list(second_gate.shape)}, expected {list(first_gate.shape)}"
            " like the first"
        )
    others = {"second": second, "first_gate": first_gate, "second_gate": second_gate}
    for name, tensor in others.items():
        if tensor.device != first.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {first.device}")
