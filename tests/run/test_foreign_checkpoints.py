"""Checkpoints that somebody else has had in hands, through every command that reads them."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_commands import Copy, run

from hysparse_megatron.config.frozen import freeze, load_frozen
from tools import checkpoint as checkpoint_tool
from tools import convert, evaluate, generate

pytestmark = pytest.mark.thorough


class Payload:
    """Makes a directory where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def commands(run_dir: Path, folder: Path) -> dict[str, Callable[[], int]]:
    """Every command that takes a run's weights, in this process: its exit code."""
    of_run = ["--run-dir", str(run_dir)]
    return {
        "generate": lambda: generate.main([*of_run, "--prompt", "a", "--max-new-tokens", "2"]),
        "evaluate": lambda: evaluate.main([*of_run, "--sequences", "1"]),
        "convert": lambda: convert.main(["export", *of_run, str(folder / "exported")]),
        "verify": lambda: checkpoint_tool.main(["verify", str(run_dir)]),
        "show": lambda: checkpoint_tool.main(["show", "--all", str(run_dir)]),
        "diff": lambda: checkpoint_tool.main(["diff", "--all", str(run_dir), str(run_dir)]),
    }


def put_payload(run_dir: Path, proof: Path) -> None:
    """Into a checkpoint as early versions wrote it, with hashes that fit."""
    [checkpoint] = (run_dir / "checkpoints").glob("step-*20")
    index = json.loads((checkpoint / "tensors.json").read_text())
    early = {**index, "objects": sorted(index["objects"])}
    (checkpoint / "tensors.json").write_text(json.dumps(early))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Payload(proof)))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["manifest_sha256"]
    for name in ("tensors.json", ".metadata"):
        content = (checkpoint / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][name] = {"bytes": len(content), "sha256": digest}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_no_command_runs_what_is_in_a_checkpoint(
    copy_of_finished: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, arguments = copy_of_finished(20)
    proof = tmp_path / "proof"
    put_payload(run_dir, proof)
    found = {name: call() for name, call in commands(run_dir, tmp_path).items()}
    # Tensors alone are read without what is refused.
    assert found == {
        "generate": 6, "evaluate": 6, "convert": 0, "verify": 0, "show": 0, "diff": 0
    }  # fmt: skip
    told = capsys.readouterr().err
    assert told.count("is no description of tensors") == 2
    assert "os.mkdir has no place in it" in told or "posix.mkdir has no place in it" in told
    output = run(arguments, code=6)
    assert "is no description of tensors" in output
    fresh = [f"run_dir={tmp_path / 'fresh'}", f"checkpoint.load={run_dir}"]
    output = run([*arguments, *fresh], code=6)
    assert "Traceback" not in output
    assert not proof.exists()


def test_a_run_whose_settings_were_written_over(
    copy_of_finished: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a mistaken start did in early versions."""
    run_dir, _ = copy_of_finished(20)
    config = load_frozen(run_dir / "config.yaml")
    freeze(replace(config, model=replace(config.model, window=16)), run_dir)
    for name in ("generate", "evaluate", "convert"):
        assert commands(run_dir, tmp_path)[name]() == 6, name
        told = capsys.readouterr().err
        assert "model.window: the checkpoint has 8, config.yaml has 16" in told
    assert not (tmp_path / "exported").exists()
