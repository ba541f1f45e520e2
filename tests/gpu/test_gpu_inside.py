"""Looking inside a run on a GPU: profiles, a memory snapshot, runs that repeat bit for bit."""

import gzip
import json
import pickle
import random
from pathlib import Path

import pytest
import torch

from hysparse_megatron.runtime.annotations import FULL_ATTENTION, OPTIMIZER, SPARSE_ATTENTION
from hysparse_megatron.runtime.memory_history import snapshot_when_full
from tests.gpu.trained import EXPERTS, MODEL, PRECISIONS
from tests.run.run_commands import facts, run, write_text


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpus")
    text = write_text(folder / "text", random.SystemRandom().randrange(2**31))
    return [*MODEL, f"data.path={text}", f"data.cache_dir={folder / 'cache'}", "train.steps=6"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("experts", [[], EXPERTS], ids=["dense", "experts"])
def test_deterministic_runs_are_equal_to_the_bit(
    experts: list[str], precision: str, settings: list[str], tmp_path: Path
) -> None:
    arguments = [
        *settings,
        *experts,
        *PRECISIONS[precision],
        f"train.precision={precision}",
        "debug.deterministic=true",
        "model.hidden_dropout=0.1",
    ]
    for name in ("a", "b"):
        run([*arguments, f"run_dir={tmp_path / name}"])
    found = facts(tmp_path / "a")
    assert found[6, False]["loss"] < found[1, False]["loss"]
    assert facts(tmp_path / "b") == found


CUDNN = "aten::_scaled_dot_product_cudnn_attention_backward"
"""The oracle's backward, which promises no order of its sums."""


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_profile(deterministic: bool, settings: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = [
        *settings,
        *PRECISIONS["bf16"],
        "train.precision=bf16",
        "debug.profile.step_range=[3,4]",
        f"debug.deterministic={deterministic}",
        f"run_dir={run_dir}",
    ]
    run(arguments)
    with gzip.open(run_dir / "profile" / "rank0-steps-3-to-4.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = {event["name"] for event in events}
    assert {name for name in names if name.startswith("step ")} == {"step 3", "step 4"}
    assert {FULL_ATTENTION, SPARSE_ATTENTION, OPTIMIZER} <= names
    assert any(event.get("cat") == "kernel" for event in events)
    assert (CUDNN in names) is not deterministic


def test_ranges_for_nsys_leave_nothing(settings: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    profile = "debug.profile={step_range:[3,4],tool:nsys}"
    precision = [*PRECISIONS["bf16"], "train.precision=bf16"]
    run([*settings, *precision, profile, f"run_dir={run_dir}"])
    assert facts(run_dir)[6, False]["loss"] > 0
    assert not (run_dir / "profile").exists()


def test_a_snapshot_names_who_holds_memory(tmp_path: Path) -> None:
    def fill() -> None:
        held = torch.zeros(12_345_678, dtype=torch.uint8, device="cuda")
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        del held

    device = torch.device("cuda", 0)
    with (
        pytest.raises(torch.OutOfMemoryError, match="The memory snapshot of rank 0 is"),
        snapshot_when_full(tmp_path, 0, device),
    ):
        fill()
    with (tmp_path / "memory" / "rank0.pickle").open("rb") as file:
        snapshot = pickle.load(file)
    blocks = [block for segment in snapshot["segments"] for block in segment["blocks"]]
    [ours] = [block for block in blocks if block.get("requested_size") == 12_345_678]
    assert any(Path(frame["filename"]).name == Path(__file__).name for frame in ours["frames"])
