"""The wheel, in an environment of its own: everything works away from the checkout."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from run_commands import ROOT, read_json, write_text

from tests.captured import captured

pytestmark = pytest.mark.thorough

MODEL = """\
defaults:
  - schema
  - base/tiny@_here_
  - _self_
layout: F S F
hidden_size: 32
ffn_hidden_size: 48
head_dim: 8
block_size: 8
num_selected_blocks: 2
window: 8
"""
TRAIN = [
    *("train.steps=2", "train.seq_length=64", "train.global_batch_size=4"),
    *("train.micro_batch_size=2", "train.eval_batches=1", "data.validation_fraction=0.2"),
    *("data.tokenizer_vocab_size=300", "optim.warmup_steps=1", "optim.decay_steps=1"),
]

Run = Callable[..., str]


def make_wheel(folder: Path) -> Path:
    """Of a copy: building leaves folders behind, and takes what others left."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    files = captured(listed, cwd=ROOT).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "source" / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    captured([sys.executable, "-m", "pip", "wheel", *options, str(folder / "source")])
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """An empty folder, and how to run `hysparse` in it."""
    folder = tmp_path_factory.mktemp("wheel")
    wheel = make_wheel(folder)
    venv.create(folder / "env", with_pip=False, symlinks=True)
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    # The dependencies of this environment, but no .pth file there, which would find the checkout.
    found = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(found))
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    python = ["--python", str(folder / "env" / "bin" / "python")]
    subprocess.run([sys.executable, "-m", "pip", *python, *install], check=True)
    work = folder / "work"
    work.mkdir()
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**kept, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    environment["PATH"] = f"{folder / 'env' / 'bin'}:{kept['PATH']}"

    def run(*words: str, code: int = 0) -> str:
        done = captured(["hysparse", *words], cwd=work, env=environment, code=code)
        return done.stdout

    return work, run


@pytest.fixture(scope="module")
def trained(installed: tuple[Path, Run]) -> tuple[Path, Run]:
    """The same with a run of two steps of a model of its own."""
    work, run = installed
    write_text(work / "text", seed=1)
    (work / "mine" / "model").mkdir(parents=True)
    (work / "mine" / "model" / "small.yaml").write_text(MODEL)
    data = f"data.path={work / 'text'}"
    told = run("launch", "--config-dir", "mine", "model=small", "name=first", data, *TRAIN)
    assert "step 2/2" in told
    assert "hysparse launch --nproc 1 --config-dir=mine model=small" in " ".join(told.split())
    return work, run


def test_the_wheel_holds_presets_tools_and_license(tmp_path: Path) -> None:
    names = zipfile.ZipFile(make_wheel(tmp_path)).namelist()
    for name in ("conf/config.yaml", "launch/train.sbatch.j2", "tools/study/claims.yaml"):
        assert f"hysparse_megatron/{name}" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    kernels = ROOT / "kernels"
    modules = (kernels / "hysparse_kernels").rglob("*.py")
    assert {path.relative_to(kernels).as_posix() for path in modules} <= set(names)
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "hysparse_kernels",
        "hysparse_megatron",
    }


def test_a_run_is_trained_and_used(trained: tuple[Path, Run]) -> None:
    work, run = trained
    assert read_json(work / "runs" / "first" / "status.json")["state"] == "finished"
    at_run = ("--run-dir", "runs/first")
    assert run("generate", *at_run, "--prompt", "a", "--max-new-tokens", "4")
    assert "loss" in run("evaluate", *at_run, "--lengths", "64", "--sequences", "4")
    run("report", "runs/first")
    assert (work / "runs" / "first" / "report.html").stat().st_size > 1000


def test_export_and_import(trained: tuple[Path, Run]) -> None:
    work, run = trained
    run("convert", "export", "--run-dir", "runs/first", "exported")
    assert "Apache License" in (work / "exported" / "LICENSE.code").read_text()
    run("convert", "import", "exported", "starts/first")
    run("checkpoint", "diff", "runs/first", "starts/first")


def test_plans_and_jobs(installed: tuple[Path, Run]) -> None:
    work, run = installed
    assert "8 ranks" in run("plan", "--gpus", "8", "model=hysparse_7b_mini", "parallel.tp=2")
    shared = ("cluster=slurm_cpu", "train.global_batch_size=8")
    told = run("submit", "--dry-run", *shared, "run_dir=runs/job")
    assert f"cd {work}" in told
    assert "hysparse_megatron.launch.preflight" in told
    assert not (work / "runs" / "job").exists()
