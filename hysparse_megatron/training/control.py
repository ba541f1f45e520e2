"""Being told to stop: a signal on any rank becomes a decision of all ranks."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""A scheduler's pre-emption, Slurm's early warning, and Ctrl-C."""


class StopRequest:
    """Remembers a stop signal until the ranks ask for it together, between two steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._received = 0
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._received = number

    def agreed(self) -> str | None:
        """The name of a signal that some rank has received, on all ranks alike. Collective."""
        received = torch.tensor([self._received], device=self._device)
        dist.all_reduce(received, op=dist.ReduceOp.MAX)
        number = int(received.item())
        return signal.Signals(number).name if number else None
