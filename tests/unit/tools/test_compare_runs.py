"""`python -m tools.compare_runs`: the same run, equal results, or where two part."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from made_runs import evaluation_row, make_run, rows, step_row

from tools.compare_runs import main

pytestmark = pytest.mark.thorough

Capture = pytest.CaptureFixture[str]
STEPS = 8


def compare(capsys: Capture, *paths: Path, **options: object) -> tuple[int, str]:
    arguments = [str(path) for path in paths]
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def replaced(step: int, **fields: Any) -> list[dict[str, Any]]:
    """Rows of which one training step has other fields."""
    return [
        {**row, **fields} if row["step"] == step and "loss" in row else row for row in rows(STEPS)
    ]


def test_the_same_run(tmp_path: Path, capsys: Capture) -> None:
    """Speed differs, and a restart repeated a step."""
    one = make_run(tmp_path / "one", rows(STEPS))
    again = [*rows(STEPS - 2), step_row(6, restarts=1), *rows(STEPS)[-4:]]
    other = make_run(tmp_path / "two", again, starts=2)
    code, output = compare(capsys, one, other)
    assert code == 0, output
    assert "the same run: all 8 steps and all evaluations are bit-equal" in output
    assert "equal settings" in output
    assert "equal data" in output
    assert output.splitlines()[2].endswith("yes")


def test_every_evaluation_set_is_compared(tmp_path: Path, capsys: Capture) -> None:
    code = evaluation_row(8, evaluation="code", eval_loss=2.0)
    one = make_run(tmp_path / "one", [*rows(STEPS), code])
    assert compare(capsys, one, make_run(tmp_path / "same", [*rows(STEPS), code]))[0] == 0
    other = make_run(tmp_path / "two", [*rows(STEPS), {**code, "eval_loss": 2.5}])
    page = tmp_path / "page.html"
    found, output = compare(capsys, one, other, output=page)
    assert found == 1
    told = "the evaluation on code after step 8: eval_loss 2.0 and 2.5 (difference +5.000e-01)"
    assert told in output
    assert "eval_loss of code: largest difference 5.000e-01, at step 8" in output
    assert "Evaluation loss on code" in page.read_text()


def test_equal_results_of_two_runs(tmp_path: Path, capsys: Capture) -> None:
    one = make_run(tmp_path / "one", replaced(3, loss=math.nan, skipped=True))
    other = make_run(tmp_path / "two", replaced(3, loss=math.nan, skipped=True), run_id="id2")
    code, output = compare(capsys, one, other)
    assert code == 0, output
    assert "two runs with equal results" in output


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            replaced(6, loss=math.nextafter(5.0 / 6, 1.0)),
            "step 6: loss 0.8333333333333334 and 0.8333333333333335 (difference +1.110e-16)",
        ),
        (replaced(2, grad_norm=7.0), "step 2: grad_norm 3.0 and 7.0 (difference +4.000e+00)"),
        (replaced(5, skipped=True, loss=math.nan), "step 5: loss 1.0 and NaN"),
        (replaced(5, tokens=5), "step 5: tokens 2560 and 5"),
        (rows(STEPS - 1)[:-1], "step 7 is only in the first"),
        (rows(STEPS)[:-1], "the evaluation after step 8 is only in the first"),
        (
            [*rows(STEPS)[:-1], evaluation_row(8, eval_loss=3.0)],
            "the evaluation after step 8: eval_loss 3.2 and 3.0 (difference -2.000e-01)",
        ),
    ],
    ids=lambda value: value[:14] if isinstance(value, str) else "",
)
def test_where_two_part(
    changed: list[dict[str, Any]], expected: str, tmp_path: Path, capsys: Capture
) -> None:
    one = make_run(tmp_path / "one", rows(STEPS))
    other = make_run(tmp_path / "two", changed, run_id="id2")
    code, output = compare(capsys, one, other)
    assert code == 1
    assert f"first difference: {expected}\n" in output
    assert output.splitlines()[2].endswith("no")


def test_what_only_one_measures_is_no_difference(tmp_path: Path, capsys: Capture) -> None:
    one = make_run(tmp_path / "one", rows(STEPS))
    fewer = [{k: v for k, v in row.items() if "/layer_" not in k} for row in rows(STEPS)]
    assert compare(capsys, one, make_run(tmp_path / "two", fewer))[0] == 0


@pytest.mark.parametrize(
    ("changed", "share", "code", "expected"),
    [
        (
            replaced(5, loss=1.0 * 1.009),
            "0.01",
            0,
            "within 1.00%: losses of 11 .* 0.90%, at",
        ),
        (replaced(5, loss=1.0 * 1.011), "0.01", 1, "NOT within 1.00%: .* 1.10%, at step 5"),
        (rows(STEPS)[:4], "0.01", 0, "within"),
        (replaced(5, loss=math.nan), "0.5", 1, "NOT within 50.00%: .* at most inf%, at step 5"),
        (
            [*rows(STEPS)[:-1], evaluation_row(8, eval_loss=3.0)],
            "0.01",
            1,
            "6.25%, at the evaluation after step 8",
        ),
        ([step_row(100)], "0.5", 1, "NOT within 50.00%: no step is in both"),
    ],
    ids=("less", "more", "a prefix", "not finite", "evaluation", "no step"),
)
def test_within_a_share(
    changed: list[dict[str, Any]],
    share: str,
    code: int,
    expected: str,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    """Of the first run's losses; steps that only one has do not count."""
    one = make_run(tmp_path / "one", rows(STEPS))
    other = make_run(tmp_path / "two", changed, run_id="id2")
    found, output = compare(capsys, one, other, within=share)
    assert re.search(expected, output)
    assert found == code
    assert main([str(one), str(other)]) == 1


def test_steps_that_both_left_out_are_within(tmp_path: Path, capsys: Capture) -> None:
    left_out = replaced(3, loss=math.nan, skipped=True)
    one, other = (make_run(tmp_path / name, left_out) for name in ("one", "two"))
    assert compare(capsys, one, other, within="0")[0] == 0


def test_largest_differences_settings_and_data(tmp_path: Path, capsys: Capture) -> None:
    far = [
        {**row, "loss": row["loss"] + (0.5 if row["step"] == 5 else 0.25)} if "loss" in row else row
        for row in rows(STEPS)
    ]
    one = make_run(tmp_path / "one", rows(STEPS))
    other = make_run(tmp_path / "two", far, "name=hot", "optim.learning_rate=0.5", data={"x": 1})
    code, output = compare(capsys, one, other)
    assert code == 1
    assert "run and hot:" in output
    assert "although both have the id id1" in output
    assert "optim.learning_rate: 0.001 and 0.5" in output
    assert "run_dir" not in output
    assert 'data: {"fingerprint": "abc", "train_tokens": 1000} and {"x": 1}' in output
    assert "loss: largest difference 5.000e-01, at step 5" in output
    assert "grad_norm: largest" not in output


def test_three_runs_are_drawn(tmp_path: Path, capsys: Capture) -> None:
    more = ([], [], ["optim.learning_rate=0.5"])
    paths = [
        make_run(tmp_path / str(n), rows(STEPS - n), f"name=run{n}", *more[n]) for n in range(3)
    ]
    page = tmp_path / "page.html"
    code, output = compare(capsys, *paths, output=page)
    assert code == 1
    assert f"drawn: {page}" in output
    text = page.read_text()
    assert text.count("data:image/svg+xml;base64,") == 6
    assert "Difference of loss from run0" in text
    assert text.count("<th>setting</th>") == 1
    assert "<td>optim.learning_rate</td><td>0.001</td><td>0.5</td>" in text
    assert "step 7 is only in the first" in text
    assert "http" not in text.split("base64,")[0], "nothing is loaded from elsewhere"


def test_mistakes(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_run(tmp_path / "one", rows(2))
    code, output = compare(capsys, one, tmp_path / "nowhere")
    assert code == 2
    assert "nowhere is no run directory: it has no metrics.jsonl" in output
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "metrics.jsonl").write_text("")
    assert compare(capsys, one, tmp_path / "half")[0] == 2
    for arguments in ([], [str(one)]):
        assert main(arguments) == 2
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert compare(capsys, one, one)[0] == 0, "a comparison in text needs no library"
    code, output = compare(capsys, one, one, output=tmp_path / "page.html")
    assert code == 2
    assert "drawing needs matplotlib" in output


def test_rows_of_a_killed_run(tmp_path: Path, capsys: Capture) -> None:
    one = make_run(tmp_path / "one", rows(STEPS))
    with (one / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_row(9))[:30])
    assert compare(capsys, one, make_run(tmp_path / "two", rows(STEPS)))[0] == 0
