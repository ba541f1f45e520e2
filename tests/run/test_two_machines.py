"""torchrun on two machines, which here are two network namespaces with addresses of their own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_commands import ROOT, TINY, environment, facts, read_json, run

pytestmark = pytest.mark.distributed

ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Names of two namespaces that reach each other by one link, and nothing else."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        pytest.skip("making network namespaces needs root and the program ip")
    names = [f"hysparse{os.getpid()}{letter}" for letter in "ab"]
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        links = [f"hs{os.getpid() % 10**6}{letter}" for letter in "ab"]
        ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", links[1])
        ip("link", "set", links[1], "netns", names[1])
        for name, link, address in zip(names, links, ADDRESSES, strict=True):
            ip("-n", name, "link", "set", link, "name", "eth0")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        for name in made:
            ip("netns", "del", name)
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    yield names
    for name in names:
        ip("netns", "del", name)


def test_torchrun_on_two_machines_repeats_the_run_on_one(
    machines: list[str], corpus: list[str], tmp_path: Path
) -> None:
    """Two ranks on each; the pipeline crosses from machine to machine, inside a hybrid block."""
    settings = [
        *TINY,
        *corpus,
        "parallel=tp2_pp2",
        "model.layout=F S | S F",
        "train.steps=6",
        "train.eval_interval=3",
    ]
    alone = tmp_path / "alone"
    run(["--nproc", "4", *settings, f"run_dir={alone}"], entry=("-m", "launch.local"))

    run_dir = tmp_path / "run"
    started = [
        subprocess.Popen(
            [
                *("ip", "netns", "exec", machine),
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2"),
                *("--nproc-per-node=2", f"--node-rank={number}"),
                *(f"--master-addr={ADDRESSES[0]}", "--master-port=29500"),
                *("-m", "hysparse_megatron", *settings, f"run_dir={run_dir}"),
            ],
            cwd=ROOT,
            # gloo asks which interface; both machines are one and the same host name here.
            env=environment(GLOO_SOCKET_IFNAME="eth0", OMP_NUM_THREADS="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, machine in enumerate(machines)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    assert read_json(run_dir / "status.json")["state"] == "finished"
    assert facts(run_dir) == facts(alone)
