"""The command line."""

from pathlib import Path

import pytest

from hysparse_megatron.config.cli import Arguments, load, parse_arguments
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.frozen import freeze
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.run_record import other_run_warnings


def test_overrides_and_flags_in_any_order() -> None:
    found = parse_arguments(["a=1", "--cfg", "job", "~b", "--resolve", "+c=2"])
    assert found == Arguments(["a=1", "~b", "+c=2"], None, show=True)
    assert parse_arguments(found.words) == found
    assert parse_arguments([]) == Arguments([], None, show=False)


def test_a_frozen_file(tmp_path: Path) -> None:
    config = compose(["train.steps=3"])
    freeze(config, tmp_path)
    assert load(parse_arguments(["--config", str(tmp_path / "config.yaml")])) == config
    assert load(parse_arguments(["train.steps=3"])) == config


def test_a_file_in_a_run_directory_that_names_another_is_warned_of(tmp_path: Path) -> None:
    config = compose([f"run_dir={tmp_path / 'first'}"])
    (tmp_path / "first").mkdir()
    freeze(config, tmp_path / "first")

    def warnings(folder: str) -> list[str]:
        arguments = parse_arguments(["--config", str(tmp_path / folder / "config.yaml")])
        return other_run_warnings(arguments.config_file, load(arguments).run_path)

    assert warnings("first") == []
    (tmp_path / "first" / "run.json").touch()
    assert warnings("first") == []
    (tmp_path / "first").rename(tmp_path / "moved")
    (told,) = warnings("moved")
    assert f"names another, run_dir={tmp_path / 'first'}: the run in {tmp_path / 'moved'} " in told
    (tmp_path / "first").symlink_to("moved")
    assert warnings("moved") == []
    assert other_run_warnings(None, config.run_path) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-m", "train.seed=1,2"], "hysparse submit -m submits one job per point"),
        (["--multirun", "train.seed=1,2"], "one job per point"),
        (["--config", "x.yaml", "a=1"], "leave out a=1"),
        (["--cfg", "all"], "--cfg"),
        (["--stepz"], "--stepz"),
        (["--config"], "--config"),
        (["steps"], "write key=value (did you mean train.steps=...?)"),
        (["quickstrt"], "(did you mean experiment=quickstart?)"),
        (["--quickstart"], "(did you mean experiment=quickstart?)"),
        (["--experiment=quickstart"], "(did you mean experiment=quickstart?)"),
        (["--train.steps=3"], "(did you mean train.steps=3?)"),
        (["--lr=3"], "--lr=3 (did you mean optim.learning_rate=3?)"),
        (["--confg", "x.yaml"], "(did you mean --config?)"),
    ],
)
def test_wrong_command_lines(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(argv)
    assert message in str(caught.value)


def test_help_lists_groups_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_arguments(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for expected in ("tiny_hysparse", "quickstart", "--config", "exit codes", "pre-empted"):
        assert expected in text
    assert "schema" not in text
