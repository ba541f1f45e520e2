"""`summary.md`: what a finished run reached, and commands that work."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tools.convert
import tools.evaluate
import tools.generate
from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.command import hysparse
from hysparse_megatron.config.cli import load, parse_arguments
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.frozen import freeze
from hysparse_megatron.config.parallel import resized
from hysparse_megatron.config.schema import Config
from hysparse_megatron.config.validate import check
from hysparse_megatron.tracking.summary import write_summary
from tests.unit.tracking.metric_rows import evaluation, row, run_directory, write

OVERRIDES = {
    "one process": ["name=mine", "train.steps=30", "model.layout=2*(F S) F"],
    "blend": [
        "name=mine",
        "train.steps=30",
        "model.layout=2*(F S) F",
        "data.blend='1 {tmp_path}; 2 {tmp_path}'",
        "data.skip_steps='3-4'",
    ],
    "context parallel": [
        "train.steps=100",
        "optim.decay_steps=20",
        "parallel.cp=2",
        "parallel.cp_keep_kv=false",
        "parallel.num_distributed_optimizer_instances=2",
        "parallel.grad_reduce_in_fp32=false",
        "parallel.overlap.param_gather=false",
    ],
    "quickstart": ["experiment=quickstart", "train.steps=100", "optim.decay_steps=20"],
    "interleaved": [
        "model.layout=2*(F S | S) F",
        "parallel=tp2_pp2",
        "parallel.vpp=2",
        "train.steps=100",
        "checkpoint.load={tmp_path}",
    ],
}


def summary_of(overrides: list[str], ranks: int, tmp_path: Path) -> tuple[Config, str]:
    config = compose(overrides)
    steps = config.train.steps
    directory = run_directory(config.run_path)
    rows = [row(1, step_seconds=999.0), row(1), *(row(step) for step in range(2, steps + 1))]
    write(directory.metrics, [evaluation(0, 4.0), *rows, evaluation(steps, 3.0)])
    tokenizer = str(tmp_path / "tokenizer.json")
    text = write_summary(config, directory, tokenizer, ranks, overrides)
    assert (config.run_path / "summary.md").read_text() == text
    return config, text


def test_summary(tmp_path: Path) -> None:
    overrides = ["name=mine", "train.steps=3", f"run_dir={tmp_path / 'run'}"]
    config, text = summary_of(overrides, 1, tmp_path)
    assert text.startswith("# mine\n")
    for expected in (
        # A step that was repeated after a restart counts once.
        "3 steps, 300 tokens in 0.1 minutes of training, median 100 tokens/s",
        "evaluation loss 4.0000 at step 0 -> 3.0000 at step 3 (-25.0 %)",
        str(config.run_path / "checkpoints"),
        str(config.run_path / "metrics.jsonl"),
    ):
        assert expected in text


def test_summary_of_several_sets_and_of_none(tmp_path: Path) -> None:
    config = compose(["name=mine", "train.steps=1", f"run_dir={tmp_path / 'run'}"])
    directory = run_directory(config.run_path)
    write(directory.metrics, [row(1)])
    assert "no evaluation: train.eval_batches is 0" in write_summary(config, directory, "t", 1, [])
    for name, loss in (("validation", 3.0), ("code", 2.0)):
        more = {"evaluation": name, "eval_tokens": 1000, "eval_perplexity": 20.0855}
        write(directory.metrics, [{**evaluation(1, loss), **more}])
    text = write_summary(config, directory, "t", 1, [])
    held_out = "at step 1 (+0.0 %), perplexity 20.09 over 1,000 held-out tokens"
    assert f"* evaluation loss 3.0000 at step 1 -> 3.0000 {held_out}" in text
    assert f"* evaluation on code: loss 2.0000 at step 1 -> 2.0000 {held_out}" in text


@pytest.mark.parametrize("kept", [[], [row(3)], [evaluation(3, 3.0)]])
def test_a_summary_of_rows_that_were_lost(tmp_path: Path, kept: list[dict[str, Any]]) -> None:
    overrides = ["name=mine", "train.steps=3", f"run_dir={tmp_path / 'run'}"]
    config = compose(overrides)
    directory = run_directory(config.run_path)
    write(directory.metrics, kept)
    text = write_summary(config, directory, str(tmp_path / "tokenizer.json"), 1, overrides)
    of_steps, of_evaluations = ("no steps" not in text, "no evaluation" not in text)
    assert (of_steps, of_evaluations) == (kept == [row(3)], kept == [evaluation(3, 3.0)])
    assert "Train on, or something else" in text


def test_the_summary_names_what_a_model_is_used_with(tmp_path: Path) -> None:
    run_dir = tmp_path / "my run"
    _, text = summary_of(["train.steps=3", f"run_dir='{run_dir}'"], 1, tmp_path)
    words = [command[len(shlex.split(hysparse())) :] for command in commands(text, uses=True)]
    assert [command[0] for command in words] == ["generate", "evaluate", "convert", "report"]
    for parser, given in (
        (tools.generate._parser(), words[0][1:]),
        (tools.evaluate._parser(), words[1][1:]),
        (tools.convert._parser(), words[2][1:]),
    ):
        assert parser.parse_args(given).run_dir == run_dir
    assert words[3][1:] == [str(run_dir)]


@pytest.mark.parametrize("name", ["my run, 2", "it's (1) = {x}"])
def test_suggested_commands_name_any_path(name: str, tmp_path: Path) -> None:
    place = tmp_path / name
    place.mkdir()
    given = str(place / "run").replace("'", "\\'")
    overrides = ["train.steps=3", f"run_dir='{given}'"]
    config, text = summary_of(overrides, 1, place)
    tuned = load(parse_arguments(commands(text)[-1][len(shlex.split(hysparse())) + 1 :]))
    assert tuned.checkpoint.load == str(place / "run") == str(config.run_path)
    assert tuned.data.tokenizer == str(place / "tokenizer.json")
    directory = run_directory(config.run_path)
    (command,) = commands(write_summary(config, directory, "t.json", 1, []))
    assert command[-2:] == ["--config", f"{config.run_path}/config.yaml"]


def test_a_run_whose_rate_stands_where_it_would_is_prolonged_without_more(tmp_path: Path) -> None:
    constant = ["optim.schedule=constant", "optim.warmup_steps=0"]
    _, text = summary_of(["train.steps=3", *constant, f"run_dir={tmp_path / 'run'}"], 1, tmp_path)
    assert "train.steps=6\n" in text
    assert "accept_schedule_change" not in text


def commands(text: str, uses: bool = False) -> list[list[str]]:
    """The suggested commands that train, or those that use the model, as the shell splits them."""
    text = text.split("Train on, or something else")[not uses]
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith(f"    {hysparse()} ")]


@pytest.mark.parametrize("kind", OVERRIDES)
def test_suggested_commands_are_right(kind: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x")
    (tmp_path / "tokenizer.json").write_text("{}")
    overrides = [text.format(tmp_path=tmp_path) for text in OVERRIDES[kind]]
    overrides.append(f"run_dir={tmp_path / 'run'}")
    # Meant for the one start that went back, and for no other.
    overrides += ["checkpoint.step=5", "checkpoint.accept_changed_data=true"]
    ranks = 1 if kind in ("one process", "blend") else 4
    config, text = summary_of(overrides, ranks, tmp_path)
    found = commands(text)
    assert len(found) == 4
    configs = []
    for number, command in enumerate(found):
        if number < 3:
            start = [*shlex.split(hysparse()), "launch", "--nproc", str(ranks)]
        else:
            start = [*shlex.split(hysparse()), "train"]
        assert command[: len(start)] == start
        rest = [
            part.replace("FILE_OR_FOLDER", f"{tmp_path}/text") for part in command[len(start) :]
        ]
        configs.append(load(parse_arguments(rest)))
        check(configs[-1], ranks if number < 3 else 1)
    train_on, full, windows, tuned = configs
    longer = replace(config.train, steps=2 * config.train.steps)
    # All of them decay at their end, which the longer run would not have done yet.
    accepted = replace(config.optim, accept_schedule_change=True)
    assert {one.checkpoint.step for one in configs} == {None}
    assert not any(one.checkpoint.accept_changed_data for one in configs)
    checkpoint = replace(config.checkpoint, step=None, accept_changed_data=False)
    prolonged = replace(config, train=longer, optim=accepted, checkpoint=checkpoint)
    assert train_on == prolonged
    assert tuned.parallel == resized(config.parallel)
    letters = [parse_layout(one.model.layout).letters for one in (config, full, windows, tuned)]
    assert letters[1:3] == ["F" * len(letters[0]), letters[0].replace("S", "W")]
    assert letters[3] == letters[0]
    assert tuned.checkpoint.load == str(config.run_path)
    assert tuned.data.blend is None
    # Each of the new runs goes to a place of its own.
    assert len({one.run_path for one in (config, full, windows, tuned)}) == 4
    for other in (full, windows):
        assert other.checkpoint.load is None
        assert other.train == config.train
        assert other.data == config.data
        assert other.parallel == config.parallel


def test_suggestions_for_a_run_from_a_frozen_file_do_not_name_another_model(
    tmp_path: Path,
) -> None:
    """`--config FILE` has no overrides; commands without them would train the default model."""
    config = compose(["model.hidden_size=64", "train.steps=3", f"run_dir={tmp_path / 'run'}"])
    directory = run_directory(config.run_path)
    freeze(config, config.run_path)
    write(directory.metrics, [evaluation(0, 4.0), row(1), evaluation(1, 3.0)])
    for command in commands(write_summary(config, directory, "t.json", 1, [])):
        start = command.index("--nproc") + 2 if "--nproc" in command else 3
        assert load(parse_arguments(command[start:])).model.hidden_size == 64, shlex.join(command)
