"""The snapshot of a GPU without memory. The recording itself is PyTorch's, played here."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hysparse_megatron.errors import ConfigError
from hysparse_megatron.runtime.memory_history import snapshot_when_full

GPU = torch.device("cuda", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []

    def dump(path: str) -> None:
        found.append("dump")
        Path(path).write_bytes(b"snapshot")

    record = lambda enabled="all", **settings: found.append(enabled)  # noqa: E731
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    return found


def test_running_out_of_memory_leaves_a_snapshot(tmp_path: Path, calls: list[Any]) -> None:
    run_path = tmp_path / "run"
    with pytest.raises(torch.OutOfMemoryError) as failed, snapshot_when_full(run_path, 3, GPU):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    path = run_path / "memory" / "rank3.pickle"
    told = f"The memory snapshot of rank 3 is {path}. CUDA out of memory. Tried to allocate 2 GiB"
    assert str(failed.value) == told
    assert path.read_bytes() == b"snapshot"
    assert calls == ["all", "dump", None]


def test_a_snapshot_that_cannot_be_written_hides_no_cause(tmp_path: Path, calls: list[Any]) -> None:
    (tmp_path / "memory").write_text("in the way")
    with pytest.raises(torch.OutOfMemoryError) as failed, snapshot_when_full(tmp_path, 0, GPU):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert str(failed.value).startswith("No memory snapshot (")
    assert str(failed.value).endswith("CUDA out of memory")
    assert calls == ["all", None]


def test_other_endings_leave_nothing(tmp_path: Path, calls: list[Any]) -> None:
    with snapshot_when_full(tmp_path, 0, GPU):
        pass
    with pytest.raises(MemoryError), snapshot_when_full(tmp_path, 0, GPU):
        raise MemoryError("of the host")
    assert calls == ["all", None, "all", None]
    assert list(tmp_path.iterdir()) == []


def test_a_cpu_has_none(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"debug\.memory_snapshot: true needs a CUDA device"),
        snapshot_when_full(tmp_path, 0, torch.device("cpu")),
    ):
        raise AssertionError("it must not begin")
