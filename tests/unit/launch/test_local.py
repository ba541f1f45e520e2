"""What the launcher of one machine finds out before any rank starts."""

import errno
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest

from hysparse_megatron.errors import ConfigError
from hysparse_megatron.runtime.signals import STOP_SIGNALS
from launch import checks, local
from tests.captured import Call, captured

ROOT = Path(__file__).resolve().parents[3]


def test_the_ranks_meet_at_the_loopback_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with local.listen() as first:
        address, port = first.getsockname()
        assert address == "127.0.0.1"
        listening = [
            connection.laddr.ip
            for connection in psutil.Process().net_connections("inet")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        ]
        assert listening == ["127.0.0.1"]
        with local.listen(port) as second:
            assert second.getsockname()[1] != port
        assert f"note: port {port} cannot be used" in capsys.readouterr().out
    with local.listen(port) as again:
        assert again.getsockname()[1] == port


def test_without_a_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoLoopback(socket.socket):
        def bind(self, address: object) -> None:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")

    monkeypatch.setattr(local.socket, "socket", NoLoopback)
    for wanted in (0, 29500):
        with pytest.raises(ConfigError, match=r"nobody can listen at 127\.0\.0\.1") as caught:
            local.listen(wanted)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("port", ["x", "-1", "65536"])
def test_a_wrong_port(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ConfigError, match="MASTER_PORT: got"):
        local._wanted_port()


def test_too_few_descriptors(tmp_path: Path) -> None:
    start = f'ulimit -n 64; exec "{sys.executable}" -m launch.local --nproc 2 run_dir={tmp_path}/r'
    done = captured(["sh", "-c", start], cwd=ROOT, timeout=120, code=2)
    assert done.stderr.startswith("ConfigError: this process may open 64 files, and a rank needs")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("checkpoints", "code"), [(0.5, 2), (3.5, 0)])
def test_the_disk_is_looked_at_before_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
    checkpoints: float,
    code: int,
) -> None:
    started = []

    class NoRanks:
        told = False

        def __init__(self, command: list[str], num_ranks: int) -> None:
            started.append(num_ranks)

        def wait(self) -> local.Ending:
            return local.Ending(0)

    config = local.load(local.arguments_of(local.run_parser("x", "x").parse_args([])))
    one = local.overview_of(config, 1).checkpoint_bytes
    usage = shutil.disk_usage(tmp_path)._replace(free=int(checkpoints * one))
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(local, "Ranks", NoRanks)
    told = call(local.main, [f"run_dir={tmp_path / 'run'}", "checkpoint.keep=3"], code=code)
    numbers = f"disk: {usage.free / 1e9:,.1f} GB free, a checkpoint takes {one / 1e9:,.2f} GB"
    if code:
        assert f"ConfigError: {numbers}" in told.err
        assert started == []
    else:
        assert f"warning: {numbers}. checkpoint.keep=3 needs room for 4" in told.out
        assert started == [1]


def test_ranks_that_are_told_to_stop_say_so() -> None:
    former = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        for told in (False, True):
            ranks = local.Ranks([sys.executable, "-c", f"import time; time.sleep({60 * told})"], 2)
            if told:
                os.kill(os.getpid(), signal.SIGTERM)
            ending = ranks.wait()
            assert (ending.code, ranks.told) == (int(told), told)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
