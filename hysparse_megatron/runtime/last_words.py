"""What ranks tell each other when one of them fails: who, and why.

A rank that loses another one only sees a broken or silent connection. Each rank that fails leaves
its last words in the store that all of them share; whoever lost contact reads there what happened.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from hysparse_megatron.errors import HySparseError, RankFailure
from hysparse_megatron.runtime.worker import Worker

WAIT_SECONDS = 1.5
"""How long a rank waits for the words of the others: what it may take beyond the timeout."""

_LOOK_SECONDS = 0.05
_RESERVE_BYTES = 4 << 20
"""Kept for the end of a rank that has no other memory left."""


class _Teller:
    """The thread that talks to the store. It stands ready from the start: a rank that has used up
    its memory, or its threads, could not start one."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._lost = False
        self._heard: dict[int, dict[str, Any]] = {}
        self._reserve = bytearray(_RESERVE_BYTES)
        Worker(self._run)

    def tell(self, error: BaseException, lost: bool) -> tuple[dict[int, dict[str, Any]], bool]:
        """Leave words, after a lost contact listen to others'; what was heard, if in time."""
        self._error, self._lost = error, lost
        self._asked.set()
        return self._heard, self._done.wait(WAIT_SECONDS + 0.5)

    def make_room(self) -> None:
        """Give back the memory that was kept for what is left to do."""
        self._reserve = bytearray()

    def _run(self) -> None:
        self._asked.wait()
        assert self._error is not None
        try:
            store = distributed_c10d._get_default_store()
            words = json.dumps(_words(self._error, self._lost))
            store.set(_key(dist.get_rank()), words)
            if self._lost:
                _listen(store, self._heard)
        except (RuntimeError, ValueError, MemoryError):
            pass  # the store went with the rank that kept it
        self._done.set()


_teller: _Teller | None = None


def prepare() -> None:
    """Get ready to explain. Call it when the default process group exists."""
    global _teller
    _teller = _Teller()


def explain(error: BaseException) -> BaseException:
    """Leave our words, and return the error to end with: a RankFailure if another rank began it.

    Local; may take WAIT_SECONDS after a lost contact. Never raises.
    """
    if _teller is None or not dist.is_initialized() or dist.get_world_size() == 1:
        return error
    _teller.make_room()
    lost = _is_lost_contact(error)
    if not lost and not isinstance(error, HySparseError):
        # Before anything that may fail or wait; without buffers, so that it is out.
        line = f"rank {dist.get_rank()} failed: {_name(error)}\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode(errors="replace"))
    # By a thread: a store whose keeper was stopped would never answer.
    heard, answered = _teller.tell(error, lost)
    return _judge(error, heard, answered) if lost else error


def _words(error: BaseException, lost: bool) -> dict[str, Any]:
    return {
        "text": str(error) if isinstance(error, HySparseError) else _name(error),
        "exit_code": error.exit_code if isinstance(error, HySparseError) else 1,
        "host": socket.gethostname(),
        "lost": lost,
    }


def _name(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _key(rank: int) -> str:
    return f"last_words/{rank}"


def _listen(store: dist.Store, heard: dict[int, dict[str, Any]]) -> None:
    """Collect words until a cause is among them, or all have spoken, or time is over."""
    end = time.monotonic() + WAIT_SECONDS
    silent = set(range(dist.get_world_size()))
    while silent and time.monotonic() < end:
        for rank in sorted(silent):
            if store.check([_key(rank)]):
                heard[rank] = json.loads(store.get(_key(rank)))
        silent -= heard.keys()
        if not all(words["lost"] for words in heard.values()):
            return
        time.sleep(_LOOK_SECONDS)


def _judge(error: BaseException, heard: dict[int, dict[str, Any]], answered: bool) -> BaseException:
    for rank, words in sorted(heard.items()):
        if not words["lost"]:
            failure = RankFailure(f"rank {rank} on {words['host']} failed: {words['text']}", rank)
            failure.exit_code = words["exit_code"]
            return failure
    silent = sorted(set(range(dist.get_world_size())) - heard.keys() - {dist.get_rank()})
    if not answered or (silent and not heard):
        silent = [0]  # it keeps the store
    if not silent:
        return RankFailure(f"the ranks lost contact with each other: {_name(error)}", None)
    named = ", ".join(map(str, silent))
    return RankFailure(
        f"no word from rank {named}: killed, stopped, hanging or cut off. Rank "
        f"{dist.get_rank()} on {socket.gethostname()} saw: {_name(error)}",
        silent[0],
    )


def _is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed, and not what a rank did by itself."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("gloo", "NCCL", "Connection closed by peer")
    )
