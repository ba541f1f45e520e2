"""A job runs the code that was submitted, whatever becomes of the checkout."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from hysparse_megatron.source import git_state
from launch import snapshot
from launch.snapshot import make_snapshot, snapshot_folder
from tests.captured import captured, import_path

ROOT = Path(__file__).resolve().parents[3]
PARTS = ("hysparse_megatron", "kernels", "launch", "conf")

SRUN = """#!/bin/bash
while [[ $1 != */python* ]]; do shift; done
exec "$1" -c 'import json, hysparse_kernels, hysparse_megatron.source as source
import hysparse_megatron.launch.requeue as requeue
from hysparse_megatron.config.compose import config_directory
where = [hysparse_kernels.__file__, requeue.__file__, source.__file__, str(config_directory())]
print(json.dumps([where, source.git_state()]))' >> "$ASKED"
"""
"""In place of what the ranks would run: where their code comes from."""


@pytest.mark.thorough
def test_a_job_runs_what_was_submitted(tmp_path: Path) -> None:
    checkout, run_dir, programs = (tmp_path / name for name in ("checkout", "run", "bin"))
    for part in PARTS:
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    programs.mkdir()
    sbatch, queue = "#!/bin/sh\necho 7\n", "#!/bin/sh\n"
    for name, text in {"srun": SRUN, "sbatch": sbatch, "squeue": queue, "scontrol": queue}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    asked = tmp_path / "asked"
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": import_path(checkout / "kernels"),
        "GIT_CEILING_DIRECTORIES": str(tmp_path),
        "ASKED": str(asked),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1",
    }
    submit = [sys.executable, "-m", "launch.submit", "cluster=slurm_cpu", "train.steps=20"]
    run = [*submit, "train.global_batch_size=8", f"run_dir={run_dir}"]
    captured(run, cwd=checkout, env=environment)
    for file in checkout.rglob("*.py"):  # somebody goes on working
        file.write_text("raise SystemExit('changed')\n")
    (checkout / "conf" / "config.yaml").unlink()

    script = ["bash", str(run_dir / "job.sbatch")]
    captured(script, env=environment)
    (copied,) = (run_dir / "code").iterdir()
    for line in asked.read_text().splitlines():
        where, state = json.loads(line)
        assert [Path(path).relative_to(copied).parts[0] for path in where] == [
            "hysparse_kernels",
            "launch",
            "hysparse_megatron",
            "conf",
        ]
        assert state["snapshot"] == f"code/{copied.name}"
    shutil.rmtree(copied)
    told = captured(script, env=environment, code=1).stderr
    assert told == f"{copied} is gone: submit the run again\n"


def test_equal_code_is_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_snapshot(tmp_path)
    assert folder == snapshot_folder(tmp_path) == make_snapshot(tmp_path)
    assert [path.name for path in (tmp_path / "code").iterdir()] == [folder.name]
    kept = json.loads((folder / "snapshot.json").read_text())
    assert kept == {**(git_state() or {}), "snapshot": f"code/{folder.name}"}
    assert (folder / "launch" / "train.sbatch.j2").is_file()
    assert not list(folder.rglob("__pycache__"))
    other = tmp_path / "other.py"
    other.write_text("other = 1\n")
    files = snapshot._files()
    monkeypatch.setattr(snapshot, "_files", lambda: {**files, "launch/other.py": other})
    assert make_snapshot(tmp_path) != folder
    assert len(list((tmp_path / "code").iterdir())) == 2
