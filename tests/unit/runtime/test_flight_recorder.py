"""The flight recorder's variables: set by default, known to this torch, the user's kept."""

import mmap
import os
from pathlib import Path

import pytest
import torch

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import ParallelConfig
from hysparse_megatron.runtime import device
from hysparse_megatron.runtime.flight_recorder import FILE_PREFIX, LOG_FOLDER, set_defaults
from hysparse_megatron.runtime.launcher import Rank
from hysparse_megatron.training.run import run


def defaults(run_path: Path, **given: str) -> dict[str, str]:
    environment = dict(given)
    set_defaults(run_path, environment)
    return environment


def test_all_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert defaults(tmp_path) == {
        "TORCH_FR_BUFFER_SIZE": "20000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/{LOG_FOLDER}/{FILE_PREFIX}",
    }
    monkeypatch.chdir(tmp_path)
    found = defaults(Path("runs/mine"))["TORCH_FR_DUMP_TEMP_FILE"]
    assert found == f"{tmp_path}/runs/mine/logs/nccl_rank_", "also where a rank goes elsewhere"


@pytest.mark.parametrize(
    ("name", "older"),
    [
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"),
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", None),
    ],
)
def test_the_user_wins(tmp_path: Path, name: str, older: str | None) -> None:
    assert defaults(tmp_path, **{name: "7"})[name] == "7"
    if older is not None:
        found = defaults(tmp_path, **{older: "7"})
        assert name not in found, "the new name would win inside torch"
        assert len(found) == 3


def test_torch_knows_the_names(tmp_path: Path) -> None:
    """A variable that nobody reads would be set in vain."""
    libraries = Path(torch.__file__).parent / "lib"
    if not (libraries / "libtorch_cuda.so").exists():
        pytest.skip("this torch has no NCCL")
    left = set(defaults(tmp_path))
    for name in ("libtorch_cpu.so", "libtorch_cuda.so"):
        with (
            (libraries / name).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            left -= {variable for variable in left if content.find(variable.encode() + b"\0") >= 0}
    assert left == set()


def test_a_run_sets_them_before_it_makes_a_process_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in defaults(tmp_path):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # so that the end of the test takes away what is set here
    found: list[str] = []

    def start(rank: Rank, parallel: ParallelConfig) -> None:
        found.append(os.environ["TORCH_FR_DUMP_TEMP_FILE"])
        raise SystemExit

    monkeypatch.setattr(device, "start", start)
    with pytest.raises(SystemExit):
        run(compose([f"run_dir={tmp_path}/run"]), Rank(0, 1, 0, 1))
    assert found == [f"{tmp_path}/run/logs/nccl_rank_"]
