"""Which signals tell a run to save and stop. Imports no torch."""

from __future__ import annotations

import signal

STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
)
"""A scheduler's pre-emption, Slurm's early warning, Ctrl-C, a terminal that was closed, Ctrl-\\."""


def signals_to_handle() -> list[signal.Signals]:
    """`STOP_SIGNALS`, but not those of a terminal that `nohup` or a shell has this process ignore.

    A background job of a script ignores SIGINT too, and is stopped by it nevertheless: kill -INT.
    """
    of_a_terminal = (signal.SIGHUP, signal.SIGQUIT)
    return [
        number
        for number in STOP_SIGNALS
        if number not in of_a_terminal or signal.getsignal(number) is not signal.SIG_IGN
    ]
