"""TensorBoard beside the run: what is in its files, and that its failures stop nothing."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from hysparse_megatron.tracking.tensorboard import FOLDER, TensorBoard

pytest.importorskip("tensorboard", reason="needs the package tensorboard")


def row(step: int, loss: float = 2.0) -> dict[str, Any]:
    return {"step": step, "loss": loss, "skipped": step == 2, "mfu": None, "bad": "loss spike"}


def scalars(run_path: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every scalar, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_path / FOLDER), size_guidance={"scalars": 0}).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


@pytest.fixture
def warnings() -> list[str]:
    return []


def test_rows_are_scalars(tmp_path: Path, warnings: list[str]) -> None:
    board = TensorBoard(tmp_path, 0, warnings.append)
    board.log({"step": 0, "eval_loss": 3.5, "oracle_mass/layer_004": 0.75})
    board.log(row(1))
    board.log(row(2, loss=math.nan))
    board.close(0)
    found = scalars(tmp_path)
    assert found["eval/eval_loss"] == [(0, 3.5)]
    assert found["eval/oracle_mass/layer_004"] == [(0, 0.75)]
    assert found["train/skipped"] == [(1, 0.0), (2, 1.0)]
    assert found["train/loss"][0] == (1, 2.0)
    assert math.isnan(found["train/loss"][1][1])
    assert set(found) == {
        "eval/eval_loss",
        "eval/oracle_mass/layer_004",
        "train/loss",
        "train/skipped",
    }
    assert warnings == []


def test_texts_are_shown_as_they_are(tmp_path: Path, warnings: list[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path, 0, warnings.append)
    board.log({"step": 4, "eval_loss": 3.5, "sample_prompt": "a <", "sample": " b"})
    board.close(0)
    events = EventAccumulator(str(tmp_path / FOLDER)).Reload()
    (shown,) = events.Tensors("eval/sample/text_summary")
    assert shown.step == 4
    assert shown.tensor_proto.string_val[0] == b"<pre><b>a &lt;</b> b</pre>"
    assert warnings == []


def test_a_restart_takes_back_what_it_repeats(tmp_path: Path, warnings: list[str]) -> None:
    board = TensorBoard(tmp_path, 0, warnings.append)
    for step in (1, 2, 3):
        board.log(row(step))
    board.close(1)
    again = TensorBoard(tmp_path, 2, warnings.append)
    again.log(row(3, loss=1.0))
    again.close(0)
    assert scalars(tmp_path)["train/loss"] == [(1, 2.0), (2, 2.0), (3, 1.0)]


def test_a_folder_that_cannot_be_made(tmp_path: Path, warnings: list[str]) -> None:
    (tmp_path / FOLDER).write_text("in the way")
    board = TensorBoard(tmp_path, 0, warnings.append)
    board.log(row(1))
    board.close(0)
    (warning,) = warnings
    assert warning.startswith("TensorBoard did not start")


def test_without_its_package(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings are refused then; a frozen run that goes on elsewhere must not fail."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    TensorBoard(tmp_path, 0, warnings.append).log(row(1))
    assert len(warnings) == 1


def test_a_write_that_fails_is_told_once(tmp_path: Path, warnings: list[str]) -> None:
    board = TensorBoard(tmp_path, 0, warnings.append)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    writer = board._writer
    writer.add_scalar = fail
    board.log(row(1))
    board.log(row(2))
    board.close(0)
    writer.close()
    (warning,) = warnings
    assert "no space left" in warning
    assert "Training goes on" in warning
