"""`metrics.jsonl` as it is after kills and restarts, the console, and the summary."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
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
from hysparse_megatron.config.schema import Config
from hysparse_megatron.config.validate import check
from hysparse_megatron.tracking.metrics import (
    Console,
    MetricsFile,
    by_evaluation,
    chart_values,
    read_metrics,
    results,
)
from hysparse_megatron.tracking.summary import write_summary


def row(step: int, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "grad_norm": 0.5,
        "learning_rate": 1e-3,
        "tokens": 100 * step,
        "tokens_per_second": 50.0 * step,
        "step_seconds": 2.0,
        "skipped": False,
        **more,
    }


def evaluation(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "eval_loss": loss, "eval_seconds": 0.1}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    metrics = MetricsFile(path)
    for one in rows:
        metrics.write(one)
    metrics.close()


def test_rows_come_back_bit_exact(tmp_path: Path) -> None:
    rows = [evaluation(0, 5.1), row(1, 0.1 + 0.2), row(2, 1e-300), evaluation(2, 4.9)]
    write(tmp_path / "m", rows)
    assert read_metrics(tmp_path / "m") == rows
    assert [json.loads(line) for line in (tmp_path / "m").read_text().splitlines()] == rows


def test_a_row_is_on_disk_before_the_file_is_closed(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "m")
    metrics.write(row(1))
    assert read_metrics(tmp_path / "m") == [row(1)]
    metrics.close()


def test_the_last_row_of_a_step_wins(tmp_path: Path) -> None:
    write(tmp_path / "m", [row(1, 1.0), row(2, 2.0), evaluation(2, 9.0), row(3, 3.0)])
    again = [row(2, 2.5), evaluation(2, 9.5), row(3, 3.5)]
    write(tmp_path / "m", again)
    assert read_metrics(tmp_path / "m") == [row(1, 1.0), *again]


def test_what_a_start_went_back_from_is_no_part_of_the_run(tmp_path: Path) -> None:
    """As after `checkpoint.step=2` with a shorter run and other evaluations."""
    rows = [evaluation(0, 5.0), row(1), row(2), evaluation(2, 4.0), row(3), row(4)]
    write(tmp_path / "m", [*rows, evaluation(4, 8.0), row(5), row(6), evaluation(6, 9.0)])
    write(tmp_path / "m", [row(3, 3.5)])
    assert read_metrics(tmp_path / "m") == [*rows[:4], row(3, 3.5)]
    write(tmp_path / "m", [row(4, 3.4), row(5, 3.3), evaluation(5, 3.0)])
    again = [row(3, 3.5), row(4, 3.4), row(5, 3.3), evaluation(5, 3.0)]
    assert read_metrics(tmp_path / "m") == [*rows[:4], *again]
    # A start that makes up for an evaluation has gone back by its first step.
    write(tmp_path / "m", [evaluation(4, 3.2), row(5, 3.1)])
    assert read_metrics(tmp_path / "m")[4:] == [*again[:2], evaluation(4, 3.2), row(5, 3.1)]


def test_every_set_keeps_its_rows(tmp_path: Path) -> None:
    """Rows of runs before there were several have no name: they are of the run's own split."""
    own, code = {"evaluation": "validation"}, {"evaluation": "code"}
    rows = [
        evaluation(2, 9.0),
        row(2),
        {**evaluation(2, 7.0), **code},
        {**evaluation(2, 8.0), **own},
    ]
    write(tmp_path / "m", rows)
    found = read_metrics(tmp_path / "m")
    assert found == [rows[1], rows[2], rows[3]]
    assert by_evaluation(found) == {"code": [rows[2]], "validation": [rows[3]]}
    assert set(chart_values(rows[2])) == {"eval/eval_loss/code", "eval/eval_seconds/code"}
    assert set(chart_values(rows[3])) == {"eval/eval_loss", "eval/eval_seconds"}


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_garbled_last_line_is_left_out(tmp_path: Path, cut: int) -> None:
    write(tmp_path / "m", [row(1), row(2)])
    text = (tmp_path / "m").read_text()
    (tmp_path / "m").write_text(text + text.splitlines()[1][:cut])
    assert read_metrics(tmp_path / "m") == [row(1), row(2)]


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_restart_loses_nothing_to_a_garbled_line_before_it(tmp_path: Path, cut: int) -> None:
    write(tmp_path / "m", [row(1), row(2)])
    text = (tmp_path / "m").read_text()
    (tmp_path / "m").write_text(text + text.splitlines()[1][:cut])
    write(tmp_path / "m", [row(3), row(4)])
    assert read_metrics(tmp_path / "m") == [row(1), row(2), row(3), row(4)]


TORN = [
    b"\xff\xfe{",
    b"7",
    b"null",
    b'"text"',
    b"[]",
    b'{"loss": 1.0}',
    b'{"step": "3"}',
    b"[" * 9**6,
]


@pytest.mark.parametrize("torn", TORN)
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_what_is_no_row_is_left_out_and_told(
    tmp_path: Path, torn: bytes, end: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m"
    write(path, [row(1), row(2)])
    with path.open("ab") as file:
        file.write(torn + end)
    write(path, [row(3)])
    assert read_metrics(path) == [row(1), row(2), row(3)]
    told = capsys.readouterr().err
    assert told == f"warning: {path}: 1 lines that are no rows are left out, first line 3\n"


def test_results_of_equal_runs_are_equal() -> None:
    measured = {
        "tokens_per_second_per_gpu": 5.0,
        "tflops_per_gpu": 0.1,
        "mfu": None,
        "peak_memory_bytes": 1,
        "restarts": 3,
        "forward_seconds_median": 0.2,
        "slowest_ranks": [],
    }
    shown = {"step", "loss", "grad_norm", "learning_rate", "tokens", "skipped", "moe_load"}
    assert results(row(3, **measured, moe_load=1.5)).keys() == shown
    assert results(evaluation(3, 4.0)) == {"step": 3, "eval_loss": 4.0}


def test_not_a_number_survives(tmp_path: Path) -> None:
    write(tmp_path / "m", [row(1, float("nan"), skipped=True)])
    (found,) = read_metrics(tmp_path / "m")
    assert found["loss"] != found["loss"]
    assert found["skipped"] is True


def test_console_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("hysparse_megatron.tracking.metrics.time.monotonic", lambda: now[0])
    train = compose(["train.steps=200", "train.global_batch_size=8"]).train
    console = Console(train)
    batch = {"global_batch_size": 8}
    for step in (101, 102):
        now[0] += 60.0  # two steps in two minutes: 98 to go
        console.step(
            row(step, 2.34567, grad_norm=1.5, tokens_per_second=12345.6, samples=8 * step, **batch)
        )
    assert capsys.readouterr().out.splitlines()[-1] == (
        "step 102/200  loss 2.3457  grad norm 1.500  lr 1.00e-03  12,346 tokens/s  ETA 1:38:00"
    )
    console.step(row(199, samples=8 * 199, skipped=True, **batch))
    line = capsys.readouterr().out
    assert line.endswith("ETA 0:40  SKIPPED\n")
    console.step(row(200, samples=8 * 200, mfu=0.4123, tokens_per_second=5.0, **batch))
    assert "  5 tokens/s  MFU 41.2 %  ETA 0:00" in capsys.readouterr().out


def test_the_eta_of_a_ramp_counts_samples(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("hysparse_megatron.tracking.metrics.time.monotonic", lambda: now[0])
    ramp = ["train.batch_ramp=[2,2,12]", "train.global_batch_size=8", "train.steps=7"]
    console = Console(compose(ramp).train)
    now[0] += 30.0  # of sizes 2 2 4 6 8 8 8 the first two are done
    console.step(row(1, samples=2, global_batch_size=2))
    now[0] += 30.0
    console.step(row(2, samples=4, global_batch_size=2))
    assert "ETA 8:30" in capsys.readouterr().out.splitlines()[-1]


def test_a_long_run_prints_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(compose(["train.steps=238419"]).train, interval=100)
    batch = {"global_batch_size": 8}
    for step in range(206, 501):
        console.step(row(step, skipped=step == 333, **batch, samples=8 * step))
    told = [int(line.split("/")[0].split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert told == [206, 300, 333, 400, 500]
    console.step(row(238_419, **batch, samples=8 * 238_419))
    assert "step 238419/238419" in capsys.readouterr().out


def test_lines_by_the_length_of_a_run() -> None:
    lengths = {steps: compose([]).tracking.steps_between_lines(steps) for steps in LENGTHS}
    assert lengths == {1: 1, 1000: 1, 1001: 10, 100_000: 10, 238_419: 100}
    assert compose(["tracking.log_interval=7"]).tracking.steps_between_lines(238_419) == 7


LENGTHS = (1, 1000, 1001, 100_000, 238_419)

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
    directory: Any = SimpleNamespace(
        path=config.run_path,
        metrics=config.run_path / "metrics.jsonl",
        checkpoints=config.run_path / "checkpoints",
    )
    config.run_path.mkdir()
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
    path = config.run_path
    directory: Any = SimpleNamespace(
        path=path, metrics=path / "metrics.jsonl", checkpoints=path / "checkpoints"
    )
    path.mkdir()
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
    directory: Any = SimpleNamespace(
        path=config.run_path,
        metrics=config.run_path / "metrics.jsonl",
        checkpoints=config.run_path / "checkpoints",
    )
    config.run_path.mkdir()
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
    directory: Any = SimpleNamespace(
        path=config.run_path,
        metrics=config.run_path / "metrics.jsonl",
        checkpoints=config.run_path / "checkpoints",
    )
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
    assert train_on == replace(config, train=longer, optim=accepted)
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
    directory: Any = SimpleNamespace(
        path=config.run_path,
        metrics=config.run_path / "metrics.jsonl",
        checkpoints=config.run_path / "checkpoints",
    )
    config.run_path.mkdir()
    freeze(config, config.run_path)
    write(directory.metrics, [evaluation(0, 4.0), row(1), evaluation(1, 3.0)])
    for command in commands(write_summary(config, directory, "t.json", 1, [])):
        start = command.index("--nproc") + 2 if "--nproc" in command else 3
        assert load(parse_arguments(command[start:])).model.hidden_size == 64, shlex.join(command)
