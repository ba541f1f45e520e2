"""Commands as forks of one process that has imported what they all import: seconds less each.

A fork is a process like any other: of its own session, memory and end. It cannot show what a start
itself may break: imports and their order, seeds of hashes, an interpreter's options and variables.
Commands of tests about those, of wheels, of torchrun and of Slurm are started afresh.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
_MOST_BYTES = 1 << 20
_Popen = subprocess.Popen  # in tests, another may take its place
COMMAND_LINE, ENVIRONMENT = "command line", "environment"
"""Files in memory that hold them, open in every fork: what `ps` shows is the server's."""


class Fork:
    """One fork, with those methods of `subprocess.Popen` that tests use."""

    def __init__(self, status: int) -> None:
        self._status = os.fdopen(status, "rb", buffering=0)
        self._code: int | None = None
        self.pid = self._number()

    def _number(self) -> int:
        return int.from_bytes(self._status.read(8), signed=True)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Like `poll`, at its end. Raises TimeoutExpired."""
        if self._code is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._status, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired("a fork", timeout or 0)
            self._code = self._number()
            self._status.close()
        return self._code

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """By SIGKILL."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """Starts forks; `close` ends the server, and leaves its forks alone."""

    def __init__(self) -> None:
        self._channel, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            self._process = _Popen(
                [sys.executable, "-m", "tests.forks", str(there.fileno())],
                cwd=ROOT,
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is not for it
            )

    def start(
        self,
        words: Sequence[str],
        output: int,
        error: int | None = None,
        cwd: Path | str = ROOT,
        environment: Mapping[str, str] = os.environ,
        descriptor: int | None = None,
    ) -> Fork:
        """Run `python *words`, `-m` and a module or `-c` and a text and arguments.

        Its errors go to `output` too, or to `error`. `descriptor`, if it is one, is in INHERITED.
        """
        ours, theirs = os.pipe()
        request = {"words": list(words), "cwd": str(cwd), "environment": dict(environment)}
        message = json.dumps(request).encode()
        assert len(message) < _MOST_BYTES
        more = [] if descriptor is None else [descriptor]
        outputs = [output, output if error is None else error]
        socket.send_fds(self._channel, [message], [theirs, *outputs, *more])
        os.close(theirs)
        return Fork(ours)

    def close(self) -> None:
        """No forks from now on."""
        self._channel.close()
        self._process.wait()


@functools.cache
def fork_server() -> ForkServer:
    """The one of this process, which is made with its first fork."""
    return ForkServer()


class ServedPopen(subprocess.Popen):
    """In place of `subprocess.Popen` where a test calls what runs `python -m ...`: a fork."""

    _fork: Fork | None = None

    def _execute_child(self, args: Any, *rest: Any) -> None:
        if isinstance(args, str) or list(args[:2]) != [sys.executable, "-m"]:
            return super()._execute_child(args, *rest)  # type: ignore[misc]
        cwd, environment = rest[4:6]
        pipes = rest[9:15]
        output, error = (pipe if pipe >= 0 else i for i, pipe in ((1, pipes[3]), (2, pipes[5])))
        environment = os.environ if environment is None else environment
        self._fork = fork_server().start(args[1:], output, error, cwd or os.getcwd(), environment)
        self._child_created = True
        self.pid = self._fork.pid
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
        return None

    def _internal_poll(self, *rest: Any, **more: Any) -> int | None:
        if self._fork is None:
            return super()._internal_poll(*rest, **more)  # type: ignore[misc]
        self.returncode = self._fork.poll()
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._fork is None:
            return super()._wait(timeout)  # type: ignore[misc]
        self.returncode = self._fork.wait(timeout)
        return self.returncode


INHERITED: list[int] = []
"""In a fork: the descriptor that it was given."""


def serve(channel: socket.socket) -> None:
    """Fork for every request until the channel is closed. One thread, as others would not fork."""
    running: dict[int, tuple[int, int]] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is channel:
                    message, descriptors, *_ = socket.recv_fds(channel, _MOST_BYTES, 4)
                    if not message:
                        return
                    pid = os.fork()
                    if pid == 0:
                        selector.close()
                        channel.close()
                        for pidfd, (_, status) in running.items():
                            os.close(pidfd)
                            os.close(status)
                        _become(json.loads(message), descriptors)
                    status, *rest = descriptors
                    for descriptor in rest:
                        os.close(descriptor)
                    os.write(status, pid.to_bytes(8, signed=True))
                    pidfd = os.pidfd_open(pid)
                    running[pidfd] = pid, status
                    selector.register(pidfd, selectors.EVENT_READ)
                else:
                    pidfd = key.fd
                    selector.unregister(pidfd)
                    pid, status = running.pop(pidfd)
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    with contextlib.suppress(BrokenPipeError):  # nobody waits for it
                        os.write(status, code.to_bytes(8, signed=True))
                    os.close(status)
                    os.close(pidfd)


def _become(request: dict[str, Any], descriptors: list[int]) -> NoReturn:
    """Turn this fork of the server into the command."""
    status, output, error, *INHERITED[:] = descriptors
    os.close(status)
    os.setsid()
    os.dup2(output, 1)
    os.dup2(error, 2)
    os.close(output)
    os.close(error)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    subprocess.Popen = ForkingPopen  # type: ignore[misc]
    run_python(request["words"])


def run_python(words: Sequence[str]) -> NoReturn:
    """End this process as `python *words` would."""
    variables = [f"{name}={value}" for name, value in os.environ.items()]
    for name, values in ((COMMAND_LINE, [sys.executable, *words]), (ENVIRONMENT, variables)):
        os.write(os.memfd_create(name), "\0".join(values).encode())
    # The server's know what it was started with. Unbuffered, as PYTHONUNBUFFERED makes them.
    for name, number, errors in (("stdout", 1, "strict"), ("stderr", 2, "backslashreplace")):
        raw = io.FileIO(number, "w", closefd=False)
        stream = io.TextIOWrapper(raw, "utf-8", errors, write_through=True)  # type: ignore[type-var]
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    kind, what, *arguments = words
    code: Any = 1
    try:
        if kind == "-m":
            sys.path[0] = os.getcwd()
            sys.argv = [what, *arguments]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = ""
            sys.argv = [kind, *arguments]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), main.__dict__)
        code = 0
    except SystemExit as end:
        code = 0 if end.code is None else end.code
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    os._exit(code & 0xFF)


class ForkingPopen(subprocess.Popen):
    """In a fork: if it is a launcher's, its ranks are forks of it."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *rest: Any) -> None:
        if list(args[:3]) != [sys.executable, "-m", "hysparse_megatron"]:
            return super()._execute_child(args, executable, preexec_fn, *rest)
        _, pass_fds, cwd, environment, *_, pipes = *rest[:4], rest[7:13]
        assert (cwd, *pipes) == (None, *[-1] * 6)
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            return None
        try:
            for name in os.listdir("/proc/self/fd"):
                if int(name) > 2 and int(name) not in pass_fds:
                    with contextlib.suppress(OSError):  # that of the list itself
                        os.close(int(name))
            # Handlers end with an exec.
            for number in signal.valid_signals():
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.setsid()
            preexec_fn()
            os.environ.clear()
            os.environ.update(environment)
            run_python(args[1:])
        finally:
            os._exit(1)


if __name__ == "__main__":
    # By its name, so that forks find what it has.
    from hysparse_megatron.runtime.quiet import quiet_libraries
    from tests import forks

    quiet_libraries()
    # What training, saving and loading import when they come to it; test_checkpoint.py looks.
    for name in (
        "hysparse_kernels.decode.launch",
        "hysparse_kernels.triton.launch",
        "hysparse_megatron.evaluation.held_out",
        "hysparse_megatron.inference.generate",
        "hysparse_megatron.training.run",
        "megatron.core.datasets.indexed_dataset",
        "megatron.core.dist_checkpointing.exchange_utils",
        "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
        "megatron.core.dist_checkpointing.strategies.fully_parallel",
        "megatron.core.dist_checkpointing.strategies.state_dict_saver",
        "megatron.core.models.mimo.optimizer",
        "numpy.ma",
        "tests.distributed.ranks",
        "torch._subclasses.schema_check_mode",
        "torch.utils.serialization.config",
        "transformers.models.llama.configuration_llama",
    ):
        importlib.import_module(name)

    # Collections of forks would look at all that was imported, and so copy it.
    gc.collect()
    gc.freeze()
    forks.serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
