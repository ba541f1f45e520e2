"""`python -m tools.checkpoint`: list, verify, show, diff, prune."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hysparse_megatron.checkpoint import store
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.frozen import freeze
from tests.captured import Call
from tests.checkpoints import write_checkpoint
from tools.checkpoint import main

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("group")]

ROOT = Path(__file__).resolve().parents[3]


Tensors = dict[str, torch.Tensor]


def write(checkpoints: Path, step: int, tensors: Tensors) -> Path:
    """A checkpoint whose file holds each tensor in two archives: of its first row and the rest."""

    def write_files(directory: Path) -> None:
        index: dict = {"tensors": {}, "objects": []}
        with (directory / "__0_0.distcp").open("wb") as file:
            for name, tensor in tensors.items():
                chunks = []
                for first, part in ((0, tensor[:1].clone()), (1, tensor[1:].clone())):
                    start = file.tell()
                    torch.save(part, file)
                    chunks.append(
                        {
                            "offsets": [first, 0],
                            "sizes": list(part.shape),
                            "file": "__0_0.distcp",
                            "start": start,
                            "bytes": file.tell() - start,
                        }
                    )
                dtype = str(tensor.dtype).removeprefix("torch.")
                entry = {"dtype": dtype, "shape": list(tensor.shape), "chunks": chunks}
                index["tensors"][name] = entry
        (directory / "tensors.json").write_text(json.dumps(index))

    return write_checkpoint(checkpoints, step, write_files, {"tokens": 1000 * step})


@pytest.fixture
def tensors() -> Tensors:
    return {
        "output.weight": torch.randn(3, 4),
        "norm.weight": torch.randn(2, 5).bfloat16(),
        "optimizer.state.exp_avg.output.weight": torch.randn(3, 4),
    }


@pytest.fixture
def run_dir(tmp_path: Path, tensors: Tensors) -> Path:
    """Checkpoints after 4, 8, 12, 16 and 20 steps."""
    freeze(compose(["checkpoint.keep=3", "checkpoint.keep_every=8"]), tmp_path)
    for step in range(4, 21, 4):
        write(tmp_path / "checkpoints", step, tensors)
    return tmp_path


def damage(run_dir: Path, step: int) -> Path:
    path = run_dir / "checkpoints" / f"step-{step:08d}" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").iterdir())


Capture = pytest.CaptureFixture[str]


def test_list(run_dir: Path, call: Call) -> None:
    (run_dir / "checkpoints" / "step-00000012" / "manifest.json").unlink()
    damage(run_dir, 8)
    header, *lines = call(main, ["list", str(run_dir)]).out.splitlines()
    assert header.split() == ["step", "tokens", "size", "age", "state"]
    assert [int(line.split()[0]) for line in lines] == [20, 16, 12, 8, 4]
    assert lines[0].split()[1] == "20,000"
    assert "manifest.json" in lines[2]
    assert [line.split()[-1] for line in (*lines[:2], *lines[3:])] == ["complete"] * 4
    lines = call(main, ["list", str(run_dir), "--content"]).out.splitlines()[1:]
    assert lines[0].split()[-1] == "valid"
    assert "__0_0.distcp has another content" in lines[3]


def test_verify_names_the_damaged_file(run_dir: Path, call: Call) -> None:
    assert call(main, ["verify", str(run_dir)]).out.count("valid") == 5
    path = damage(run_dir, 8)
    output = call(main, ["verify", str(run_dir)], code=6).out
    assert f"{path} has another content" in output
    assert output.count("valid") == 4
    assert main(["verify", str(path.parent)]) == 6
    assert main(["verify", str(path.parents[1] / "step-00000016")]) == 0


@pytest.mark.parametrize("target", ["/gone", "step-00000012", "a_file"])
def test_what_cannot_be_read_hides_no_other(run_dir: Path, call: Call, target: str) -> None:
    checkpoints = run_dir / "checkpoints"
    (checkpoints / "a_file").touch()
    shutil.rmtree(checkpoints / "step-00000012")
    link = checkpoints / "step-00000012"
    link.symlink_to(target)
    _, *lines = call(main, ["list", str(run_dir)]).out.splitlines()
    assert [int(line.split()[0]) for line in lines] == [20, 16, 12, 8, 4]
    told = "/manifest.json: there is none" if target == "a_file" else " cannot be read: "
    assert f"{link}{told}" in lines[2]
    assert call(main, ["list", str(link)]).out.splitlines()[1] == lines[2]
    for command in ("verify", "show"):
        done = call(main, [command, str(link)], code=6)
        assert f"{link}{told}" in done.out + done.err
    call(main, ["prune", str(run_dir), "--keep", "1", "--keep-every", "0"])
    assert link.is_symlink()
    assert (checkpoints / "step-00000020").is_dir()


def test_each_command_says_what_it_takes(run_dir: Path, call: Call) -> None:
    one = str(run_dir / "checkpoints" / "step-00000016")
    done = call(main, ["prune", one], code=2)
    assert f"prune: got one checkpoint, {one}; allowed a run directory" in done.err
    done = call(main, ["prune", str(run_dir / "nowhere")], code=6)
    assert done.err.endswith("nowhere; name a run directory\n")
    assert "step directory" in call(main, ["list", str(run_dir / "nowhere")], code=6).err


def test_show(run_dir: Path, capsys: Capture) -> None:
    assert main(["show", str(run_dir)]) == 0
    output = capsys.readouterr().out
    assert output.startswith(str(run_dir / "checkpoints" / "step-00000020"))
    assert "tokens: 20000" in output
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if "weight" in line}
    assert rows == {
        "output.weight": ["float32", "3", "x", "4", "48"],
        "norm.weight": ["bfloat16", "2", "x", "5", "20"],
    }
    assert main(["show", "--all", str(run_dir / "checkpoints" / "step-00000004")]) == 0
    assert "3 tensors, 116 bytes" in capsys.readouterr().out


def test_diff(run_dir: Path, tensors: Tensors, capsys: Capture) -> None:
    others = {name: tensor.clone() for name, tensor in tensors.items()}
    others["optimizer.state.exp_avg.output.weight"][0, 0] += 1
    same = write(run_dir / "checkpoints", 24, others)
    assert main(["diff", str(same), str(run_dir / "checkpoints" / "step-00000004")]) == 0
    assert capsys.readouterr().out == "2 tensors are equal\n"
    assert main(["diff", "--all", str(run_dir), str(run_dir / "checkpoints/step-00000004")]) == 1
    assert "exp_avg.output.weight: largest difference 1.000e+00" in capsys.readouterr().out

    others["output.weight"][2, 3] += 0.5
    others["norm.weight"] = torch.randn(2, 6)
    others["new.weight"] = torch.randn(2, 2)
    changed = write(run_dir / "checkpoints", 28, others)
    assert main(["diff", str(same), str(changed)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"new.weight: only in {changed}"
    assert lines[1] == "norm.weight: shape [2, 5] and [2, 6]"
    assert lines[2].startswith("output.weight: largest difference 5.000e-01")

    others["output.weight"][0, 1] = float("nan")
    broken = write(run_dir / "checkpoints", 32, others)
    assert main(["diff", str(changed), str(broken)]) == 1
    assert "output.weight: largest difference nan" in capsys.readouterr().out


def test_prune(run_dir: Path, call: Call) -> None:
    assert "would delete" in call(main, ["prune", str(run_dir), "--dry-run"]).out
    assert steps(run_dir) == [4, 8, 12, 16, 20]
    assert main(["prune", str(run_dir)]) == 0
    assert steps(run_dir) == [8, 12, 16, 20], "the run's own rules"
    damage(run_dir, 20)
    store.mark_proven(run_dir / "checkpoints" / "step-00000016")
    assert main(["prune", str(run_dir), "--keep", "1", "--keep-every", "0"]) == 0
    assert steps(run_dir) == [16, 20], "the newest valid one, and no judgement of a damaged one"


MISTAKES: list[tuple[Callable[[Path], list[str]], int, str]] = [
    (lambda path: ["list", str(path / "nowhere")], 6, "no valid checkpoint at"),
    (lambda path: ["show", str(path / "checkpoints" / "step-00000005")], 6, "is damaged"),
    (lambda path: ["prune", str(path / "nowhere")], 6, "no valid checkpoint at"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), MISTAKES)
def test_mistakes(
    run_dir: Path, call: Call, arguments: Callable[[Path], list[str]], code: int, text: str
) -> None:
    assert text in call(main, arguments(run_dir), code=code).err


def test_mistakes_of_the_command_line(run_dir: Path, capsys: Capture) -> None:
    for arguments in ([], ["destroy", str(run_dir)], ["prune", str(run_dir), "--keep", "-1"]):
        assert main(arguments) == 2
    assert "--keep: got -1; allowed a whole number from 0" in capsys.readouterr().err


def test_listing_does_not_wait_for_torch(run_dir: Path) -> None:
    program = (
        "import sys; from tools.checkpoint import main; code = main(['list', sys.argv[1]]); "
        "sys.exit(code or 99 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(run_dir)], cwd=ROOT, check=False)
    assert done.returncode == 0
