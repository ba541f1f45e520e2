"""Which backend runs a call, and why.

Triton and its kernels are imported only when they are asked for, as a machine may lack them.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

BACKENDS = ("auto", "reference", "triton")


class BackendUnavailable(RuntimeError):
    """The backend that was asked for by name cannot be used here; the message says why."""


class BackendChoice(NamedTuple):
    """``name`` of the backend that will run and, for the log, the ``reason`` it was chosen."""

    name: Literal["reference", "triton"]
    reason: str


def resolve_backend(
    backend: str,
    device: torch.device | str,
    *,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    block_size: int | None = None,
    hopper_shape: tuple[int, int, int] | None = None,
) -> BackendChoice:
    """Which backend ``backend`` (auto, reference or triton) means for such inputs.

    "auto" takes triton where it can run, else the reference. ``dtype``, ``head_dim`` (the larger
    one of query/key and value) and ``block_size`` are those of the call; None leaves them open.
    ``hopper_shape``, query heads per KV group and head dims of query and value, lets the reason say
    on a Hopper GPU whether its own kernels take them.

    Raises:
        ValueError: ``backend`` is none of the three.
        BackendUnavailable: ``backend`` is "triton", which cannot take such inputs.
    """
    device = torch.device(device)
    return choose(
        backend,
        lambda: _why_no_triton(device, dtype, head_dim, block_size),
        lambda: f"Triton kernels on {device.type}{_on_hopper(device, hopper_shape)}",
    )


def choose(
    backend: str, why_no_triton: Callable[[], str | None], kernels: Callable[[], str]
) -> BackendChoice:
    """The choice, given why Triton cannot take a call, or None, and what its kernels are called.

    Raises as ``resolve_backend``.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return BackendChoice("reference", "asked for by name")
    reason = why_no_triton()
    if backend == "triton":
        if reason is not None:
            raise BackendUnavailable(
                f"backend 'triton' was asked for, but {reason}; use 'auto' or 'reference'"
            )
        return BackendChoice("triton", "asked for by name")
    if reason is None:
        return BackendChoice("triton", kernels())
    return BackendChoice("reference", f"plain PyTorch: {reason}")


def _why_no_triton(
    device: torch.device, dtype: torch.dtype | None, head_dim: int | None, block_size: int | None
) -> str | None:
    try:
        from hysparse_kernels.triton import launch
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return launch.why_not(device, dtype, head_dim, block_size)


def _on_hopper(device: torch.device, shape: tuple[int, int, int] | None) -> str:
    from hysparse_kernels.hopper import launch

    if not launch.is_hopper(device):
        return ""
    refusal = None if shape is None else launch.why_not_shape(*shape)
    if refusal is not None:
        return f", not those for Hopper: {refusal}"
    return ", those for Hopper where they take the call"
