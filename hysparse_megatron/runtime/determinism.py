"""`debug.deterministic`: everything that makes a run repeat bit for bit on the same devices.

What PyTorch, cuBLAS, NCCL, Transformer Engine and megatron-core need for that, each set where it is
read. Our kernels add nothing up by atomics; cuDNN's attention backward, which does, gives way to
ours where PyTorch's switch is on. An operation without a deterministic algorithm ends the run with
PyTorch's error, which names it.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import torch

from hysparse_megatron.errors import ConfigError

VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "NCCL_ALGO": ("Ring",),
}
"""What libraries read when they start, each with the values that repeat; the first is set.

NCCL would else choose among algorithms that add in other orders (megatron.training.determinism)."""


def enforce(environment: MutableMapping[str, str] = os.environ) -> str:
    """Make what this process computes repeat. Call it before CUDA and NCCL are used.

    Returns the variables as they are now, for the start-up log. Raises ConfigError where the
    environment asks for what does not repeat.
    """
    for name, values in VARIABLES.items():
        found = environment.get(name, values[0])
        if found not in values:
            raise ConfigError(
                f"debug.deterministic: true, but {name}={found} in the environment allows "
                f"sums in any order; unset it, or set it to {' or '.join(values)}"
            )
    for name, values in VARIABLES.items():
        environment.setdefault(name, values[0])
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    return " ".join(f"{name}={environment[name]}" for name in VARIABLES)
