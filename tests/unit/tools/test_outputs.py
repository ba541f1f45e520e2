"""Files that a command line names and that cannot be written: refused early, or code 6 later."""

from pathlib import Path

import pytest

from hysparse_megatron.errors import ConfigError, OutputError
from hysparse_megatron.files import require_writable, writing
from tests.captured import Call
from tests.unit.tools.made_runs import make_run, rows
from tools import compare_runs, draw_layout, plan, report
from tools.step_benchmark.report import StepReport
from tools.study.__main__ import main as study

ROOT = Path(__file__).parents[3]
FULL = Path("/dev/full")

COMMANDS = [
    (draw_layout.main, ["F S"], []),
    (plan.main, ["experiment=quickstart"], ["--plot"]),
    (report.main, ["run"], ["--output"]),
    (compare_runs.main, ["run", "run"], ["--output"]),
]


@pytest.mark.parametrize(("main", "words", "option"), COMMANDS)
def test_a_command_ends_with_6(
    main: Call,
    words: list[str],
    option: list[str],
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", rows(4))
    told = call(main, [*words, *option, str(FULL)], code=6).err
    assert f"cannot write {FULL} (No space left on device)" in told
    assert call(main, [*words, *option, "no/folder/x"], code=2).out == "", "before any work"


def test_a_study_looks_for_its_folders_first(tmp_path: Path, call: Call) -> None:
    (tmp_path / "file").touch()
    folders = ["--data", str(tmp_path), "--work", str(tmp_path)]
    words = ["run", str(ROOT / "tools" / "study" / "claims.yaml"), *folders]
    told = call(study, [*words, "--results", str(tmp_path / "file")], code=6).err
    assert told.startswith("OutputError: --results: cannot write")
    words = ["corpus", "--sources", str(tmp_path), "--output", str(tmp_path)]
    assert "--output: cannot write" in call(study, words, code=6).err


def test_what_is_tried_first_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "new"
    require_writable(path, "--json")
    assert not path.exists()
    path.write_text("kept")
    require_writable(path, "--json")
    assert path.read_text() == "kept"
    with pytest.raises(ConfigError, match="--json: cannot write"):
        require_writable(path / "x", "--json")


def test_what_comes_after_the_work(tmp_path: Path) -> None:
    told = r"--x: cannot write /dev/full \(No space left"
    with pytest.raises(OutputError, match=told), writing(FULL, "--x"):
        FULL.write_text("x")
    steps = StepReport(
        tmp_path / "x.txt", {"date": "", "device": "", "versions": {}, "command": ""}
    )
    steps.begin()
    (tmp_path / "x.json").unlink()
    (tmp_path / "x.json").symlink_to(FULL)
    with pytest.raises(OutputError, match="--output: cannot write"):
        steps.write({})
