"""W&B beside the run: whatever it does, training goes on."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hysparse_megatron.config.schema import TrackingConfig, TrackingMode
from hysparse_megatron.tracking.wandb import Tracker
from launch.local import SECONDS_TO_END
from tests.captured import captured


class FakeRun:
    """What `wandb.init` gives, and what was asked of it."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.dir = str(Path(arguments["dir"]) / "wandb" / "offline-run-1" / "files")
        self.rows: list[dict[str, Any]] = []
        self.definitions: list[tuple[tuple, dict]] = []
        self.finished: list[int] = []
        self.error: Exception | None = None

    def log(self, row: dict[str, Any]) -> None:
        if self.error is not None:
            raise self.error
        self.rows.append(row)

    def define_metric(self, *arguments: Any, **keywords: Any) -> None:
        self.definitions.append((arguments, keywords))

    def finish(self, exit_code: int) -> None:
        if self.error is not None:
            raise self.error
        self.finished.append(exit_code)


class Wandb:
    """Replaces `wandb.init`; modes in `broken` raise."""

    def __init__(self) -> None:
        self.runs: list[FakeRun] = []
        self.asked: list[str] = []
        self.broken: set[str] = set()

    def init(self, **arguments: Any) -> FakeRun:
        self.asked.append(arguments["mode"])
        if arguments["mode"] in self.broken:
            raise RuntimeError(f"no {arguments['mode']} today")
        self.runs.append(FakeRun(arguments))
        return self.runs[-1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    import wandb

    replacement = Wandb()
    monkeypatch.setattr(wandb, "init", replacement.init)
    return replacement


@pytest.fixture
def warnings() -> list[str]:
    return []


def start(tmp_path: Path, warnings: list[str], mode: str, **more: Any) -> Tracker:
    tracking = TrackingConfig(mode=TrackingMode[mode], **more)
    return Tracker(tracking, "abcd1234", "mine", tmp_path, {"a": 1}, warnings.append)


ROW = {"step": 3, "loss": 1.5, "skipped": False}


def test_online(fake: Wandb, warnings: list[str], tmp_path: Path) -> None:
    tracker = start(tmp_path, warnings, "online", project="p", entity="e")
    (run,) = fake.runs
    given = run.arguments
    assert (given["id"], given["resume"], given["mode"]) == ("abcd1234", "allow", "online")
    assert (given["project"], given["entity"], given["name"]) == ("p", "e", "mine")
    assert (given["dir"], given["config"]) == (str(tmp_path), {"a": 1})
    assert (("*",), {"step_metric": "train/step"}) in run.definitions
    tracker.log(ROW)
    tracker.log({"step": 3, "eval_loss": 1.4, "eval_seconds": 0.1})
    assert run.rows == [
        {"train/loss": 1.5, "train/skipped": False, "train/step": 3},
        {"eval/eval_loss": 1.4, "eval/eval_seconds": 0.1, "train/step": 3},
    ]
    tracker.close(3)
    tracker.close(0)
    assert run.finished == [3]
    assert warnings == []


def test_only_what_can_be_shown_is_sent(fake: Wandb, warnings: list[str], tmp_path: Path) -> None:
    tracker = start(tmp_path, warnings, "online")
    slowest = [{"rank": 1, "host": "a", "seconds": 0.5, "medians": 2.0}]
    tracker.log({**ROW, "mfu": None, "bad": "loss spike", "slowest_ranks": slowest})
    tracker.log({"step": 3, "eval_loss": 1.4, "oracle_mass/layer_004": 0.9})
    assert fake.runs[0].rows == [
        {"train/loss": 1.5, "train/skipped": False, "train/bad": "loss spike", "train/step": 3},
        {"eval/eval_loss": 1.4, "eval/oracle_mass/layer_004": 0.9, "train/step": 3},
    ]


def test_texts_have_a_panel(fake: Wandb, warnings: list[str], tmp_path: Path) -> None:
    tracker = start(tmp_path, warnings, "online")
    tracker.log({"step": 3, "eval_loss": 1.4, "sample_prompt": "a <", "sample": " b"})
    (row,) = fake.runs[0].rows
    assert "<pre><b>a &lt;</b> b</pre>" in row.pop("eval/sample").html
    assert row == {"eval/eval_loss": 1.4, "eval/sample_prompt": "a <", "train/step": 3}
    assert warnings == []


def test_groups_and_tags_for_sweeps(fake: Wandb, warnings: list[str], tmp_path: Path) -> None:
    start(tmp_path, warnings, "offline", group="lr", tags="7b, long  warm-up,")
    start(tmp_path, warnings, "offline")
    found = [(run.arguments["group"], run.arguments["tags"]) for run in fake.runs]
    assert found == [("lr", ["7b", "long", "warm-up"]), (None, [])]


def test_a_name_for_the_tracker_alone(fake: Wandb, warnings: list[str], tmp_path: Path) -> None:
    start(tmp_path, warnings, "offline", name="shown")
    assert fake.runs[0].arguments["name"] == "shown"


def test_off_does_nothing(fake: Wandb, warnings: list[str], tmp_path: Path) -> None:
    tracker = start(tmp_path, warnings, "off")
    tracker.log(ROW)
    tracker.close(0)
    assert fake.asked == []
    assert warnings == []


def test_off_does_not_import_wandb(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from hysparse_megatron.config.schema import TrackingConfig, TrackingMode
from hysparse_megatron.tracking.wandb import Tracker
for mode in (TrackingMode.off, TrackingMode.offline):
    Tracker(TrackingConfig(mode=mode), "a", "b", Path(sys.argv[1]), {}, lambda text: None)
    print("wandb" in sys.modules)
    sys.modules.setdefault("wandb", None)  # importing it from here on raises
"""
    done = captured([sys.executable, "-c", code, str(tmp_path)])
    assert done.stdout.split() == ["False", "True"]


def test_online_falls_back_to_offline(fake: Wandb, warnings: list[str], tmp_path: Path) -> None:
    fake.broken = {"online"}
    tracker = start(tmp_path, warnings, "online")
    assert fake.asked == ["online", "offline"]
    assert len(warnings) == 2
    assert "did not start online: no online today" in warnings[0]
    assert f"wandb sync {tmp_path / 'wandb' / 'offline-run-1'}" in warnings[1]
    tracker.log(ROW)
    assert len(fake.runs[0].rows) == 1


def test_no_mode_works(fake: Wandb, warnings: list[str], tmp_path: Path) -> None:
    fake.broken = {"online", "offline"}
    tracker = start(tmp_path, warnings, "online")
    assert len(warnings) == 2
    tracker.log(ROW)
    tracker.close(0)
    assert len(warnings) == 2


def test_wandb_is_not_installed(
    warnings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = start(tmp_path, warnings, "offline")
    tracker.log(ROW)
    (warning,) = warnings
    assert "did not start offline" in warning


def test_a_log_that_fails_is_told_once(fake: Wandb, warnings: list[str], tmp_path: Path) -> None:
    tracker = start(tmp_path, warnings, "online")
    tracker.log(ROW)
    fake.runs[0].error = ConnectionError("the network is gone")
    tracker.log(ROW)
    tracker.log(ROW)
    tracker.close(0)
    (warning,) = warnings
    assert "the network is gone" in warning
    assert "Training goes on" in warning
    assert "wandb sync" in warning


def test_an_end_that_fails(fake: Wandb, warnings: list[str], tmp_path: Path) -> None:
    tracker = start(tmp_path, warnings, "online")
    fake.runs[0].error = TimeoutError("Timed out.")
    tracker.close(0)
    [told] = warnings
    assert told.startswith("W&B did not finish: Timed out. Upload what was kept with: wandb sync /")
    settings = fake.runs[0].arguments["settings"]
    assert 0 < settings.finish_timeout < SECONDS_TO_END, "or the launcher would kill the rank"
    assert settings.finish_timeout_raises


REAL = """
import sys
from pathlib import Path
from hysparse_megatron.config.schema import TrackingConfig, TrackingMode
from hysparse_megatron.tracking.wandb import Tracker
tracker = Tracker(
    TrackingConfig(mode=TrackingMode.offline), "abcd1234", "mine", Path(sys.argv[1]), {}, print
)
tracker.log({"step": 1, "loss": 2.0})
tracker.close(0)
"""


@pytest.mark.distributed
def test_offline_for_real_keeps_its_id_over_a_restart(tmp_path: Path) -> None:
    told = []
    for _ in range(2):
        done = captured([sys.executable, "-c", REAL, str(tmp_path)])
        (line,) = [line for line in done.stdout.splitlines() if "wandb sync" in line]
        told.append(Path(line.rpartition("wandb sync ")[2]))
    for folder in told:
        assert folder.parent == tmp_path / "wandb"
        assert folder.name.startswith("offline-run-")
        assert folder.name.endswith("-abcd1234")
        assert (folder / "run-abcd1234.wandb").stat().st_size > 0


def test_rows_are_plain_json(fake: Wandb, warnings: list[str], tmp_path: Path) -> None:
    tracker = start(tmp_path, warnings, "offline")
    tracker.log(ROW)
    assert json.loads(json.dumps(fake.runs[0].rows[0])) == fake.runs[0].rows[0]
