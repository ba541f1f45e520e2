"""Lets megatron-core train on a machine without CUDA.

megatron-core names the CUDA device in a few dozen places (`device="cuda"`, `.cuda()`,
`torch.cuda.current_device()`, the type name `torch.cuda.FloatTensor`). Six adaptations answer all
of them with the CPU. They live in this one file, are installed by `install()`, and `install()` does
nothing where CUDA is used.

1. `torch.cuda.current_device`, `synchronize`, `Stream`, `current_stream` and friends: inert
   stand-ins.
2. Tensor factories, `.cuda()` and `.to()` take the CPU for a CUDA device, and `Tensor.type()`
   answers with the CUDA name that the distributed optimizer compares with.
3. The "CUDA generator" is PyTorch's CPU generator, so that the tensor-parallel random streams are
   real: forked, different between ranks, restored by activation recompute.
4. Experts are sent split sizes as NumPy arrays, which megatron-core makes of CUDA tensors only and
   the collective does not take otherwise.
5. PyTorch's AdamW, and norms and scaling of gradients by loops over plain PyTorch, as where neither
   Transformer Engine nor Apex is installed: their kernels take CUDA tensors only.
6. The distributed optimizer with PyTorch's AdamW cannot load its own checkpoints (it looks for a
   `step` tensor among the loaded parameter state): see `checkpoint/state.py`, needed on GPUs too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")

_FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "empty_strided",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "randint",
    "tensor",
    "zeros",
    "zeros_like",
)


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the CPU for a CUDA device."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return function(*args, **kwargs)

    return call


def _to_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor's `to`, likewise: it takes the device by place, too."""
    by_name = _on_cpu(function)

    @functools.wraps(function)
    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and _names_cuda(args[0]):
            args = (_CPU, *args[1:])
        return by_name(tensor, *args, **kwargs)

    return call


def _cuda_type(function: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor's `type`, with the name of the CUDA type."""

    @functools.wraps(function)
    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return function(tensor, *args, **kwargs)
        return function(tensor).replace("torch.", "torch.cuda.", 1)

    return call


def _replace_functions() -> None:
    """Not a `TorchFunctionMode`, which every operation would go through: a fifth of a small step.

    Modes such as `with torch.device("meta")` see the functions behind these, as before.
    """
    _device_constructors()  # keeps those that it finds at its first call
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.to = _to_cpu(torch.Tensor.to)  # type: ignore[assignment]
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[assignment]
    torch.Tensor.type = _cuda_type(torch.Tensor.type)  # type: ignore[assignment]


class _Event:
    """An event that has already happened."""

    def synchronize(self) -> None:
        """Return at once."""


class _Stream:
    """A stream on which everything has already happened."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        """Take what `torch.cuda.Stream` takes."""

    def wait_stream(self, stream: Any) -> None:
        """Return at once: work on the CPU is in order."""

    def synchronize(self) -> None:
        """Return at once: work on the CPU is in order."""

    def record_event(self, event: Any = None) -> _Event:
        """An event that has already happened."""
        return _Event()


def _cpu_generator_state(
    device: Any = "cuda", clone: bool = False, graph_safe: bool = False
) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_generator_state(
    new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False
) -> None:
    torch.set_rng_state(new_state)


def _make_tracker() -> Any:
    from megatron.core.tensor_parallel import random as megatron_random

    class CpuRngStatesTracker(megatron_random.CudaRNGStatesTracker):
        """Named random streams kept as states of PyTorch's CPU generator."""

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random stream {name!r} or seed {seed} is already in use")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator:
            if name not in self.states_:
                raise KeyError(f"random stream {name!r} was never added")
            outside = torch.get_rng_state()
            outside_name: str = self._current_state_name  # type: ignore[has-type]
            if outside_name in self.states_:
                self.states_[outside_name] = outside
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(self.states_.get(outside_name, outside))
                self._current_state_name = outside_name

    return CpuRngStatesTracker()


def _to_numpy(
    tensor: torch.Tensor, as_numpy: bool = False, record_stream: bool = False
) -> torch.Tensor | numpy.ndarray:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


_installed = False


def is_active() -> bool:
    """Whether the adaptations are installed in this process."""
    return _installed


def install() -> bool:
    """Install the adaptations in this process if it has no CUDA device.

    Idempotent. Returns whether the adaptations are active.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if _installed:
        return True

    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    torch.cuda.Stream = _Stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda device=None: _Stream()  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    torch.cuda.nvtx.range_push = lambda message: None  # type: ignore[assignment,return-value]
    torch.cuda.nvtx.range_pop = lambda: None  # type: ignore[assignment,return-value]

    from megatron.core import optimizer as megatron_optimizer
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    megatron_optimizer.Adam = distrib_optimizer.Adam = torch.optim.AdamW
    megatron_optimizer.SGD = torch.optim.SGD
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.HAVE_APEX_OR_TE = False
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False
    clip_grads.multi_tensor_applier = utils.local_multi_tensor_applier
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.multi_tensor_scale_tensor_impl = None
    token_dispatcher.maybe_move_tensor_to_cpu = _to_numpy
    megatron_random._get_cuda_rng_state = _cpu_generator_state
    megatron_random._set_cuda_rng_state = _set_cpu_generator_state
    megatron_random._CUDA_RNG_STATE_TRACKER = _make_tracker()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    _replace_functions()
    _installed = True
    return True
