"""`python -m tools.report`: one page with everything, for runs in any state, in a real browser."""

import base64
import io
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_runs import evaluation_row, make_run, rows, step_row, with_text

from hysparse_megatron.config.compose import compose
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.plan.overview import make_overview
from hysparse_megatron.plan.picture import draw
from tests.captured import Call, captured
from tools import screenshots
from tools.report import main
from tools.run_data import load_run, smoothed

Capture = pytest.CaptureFixture[str]
SLOW_RANKS = [{"rank": 5, "host": "node-9", "seconds": 0.5, "medians": 2.25}]


def eventful() -> list[dict]:
    """A restart, a skipped step, GPUs, slow ranks."""
    found = rows(4)
    for step in (5, 6, 7, 8):
        told = {
            "forward_seconds_min": 0.1,
            "forward_seconds_median": 0.2,
            "forward_seconds_max": 0.5,
            "slowest_ranks": SLOW_RANKS,
        }
        bad = {"skipped": True, "loss": float("nan")} if step == 6 else {}
        found.append(step_row(step, restarts=1, mfu=0.4, **(told if step > 6 else {}), **bad))
    return [*found, evaluation_row(8)]


def report(run: Path, capsys: Capture) -> str:
    assert main([str(run)]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    return (run / "report.html").read_text()


def titles(page: str) -> list[str]:
    return re.findall(r'<img alt="([^"]*)"', page)


class Balance(HTMLParser):
    """Fails on a tag that is closed and not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(page: str) -> None:
    """Well formed, nothing from elsewhere, and no picture empty."""
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert not re.search(r"<script|<link|src=\"(?!data:)|url\(", page)
    for encoded in re.findall(r"base64,([\w+/=]+)", page):
        root = ElementTree.fromstring(base64.b64decode(encoded))
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 5


def test_everything_is_told(tmp_path: Path, capsys: Capture) -> None:
    run = make_run(tmp_path / "run", eventful(), "name=mine", starts=2)
    page = report(run, capsys)
    check(page)
    assert titles(page) == [
        "Loss",
        "Gradient norm",
        "Learning rate",
        "Tokens a second",
        "Model FLOPs of a rank",
        "Model FLOPs utilisation",
        "Forward passes of the ranks, a step",
        "Oracle mass inside the selection",
        "Gate of the sparse branch",
        "Sink of the window branch",
        "Oracle at layer 0",
    ]
    for expected in (
        "8 of 12",
        "4,096",
        "3.00 GiB",
        "40.0 %",
        "node-9",
        "2.25",
        "c0ffeec0ffee, changed: code.diff",
        "4711",
        "complete",
        "2,048",
        "layout: ",
        "<td>2*(F 3*S) F</td>",
        "<td>3 ranks, tp 1, pp 1, vpp 1, cp 1, ep 1</td>",
        "<td>Fast GPU on node-7</td>",
        "<td>torch 9.9</td>",
    ):
        assert expected in page, expected
    assert re.search(r"restarts</span>1<", page)
    assert re.search(r"skipped steps</span>1<", page)


@pytest.mark.thorough
def test_what_the_model_wrote_stands_as_it_was(tmp_path: Path, capsys: Capture) -> None:
    found = [with_text(evaluation_row(step)) for step in range(0, 24, 2)]
    page = report(make_run(tmp_path / "run", [*rows(4)[1:-1], *found]), capsys)
    check(page)
    assert page.count("<pre>if a &lt;</pre>") == 1
    texts = re.findall(r"<td>(\d+)</td><td><b></b> b &amp; (\d+):\n    c</td>", page)
    assert [int(step) for step, _ in texts] == [0, 4, 8, 12, 16, 22]
    assert all(step == told for step, told in texts)
    before = {**with_text(evaluation_row(0)), "sample_prompt": "else"}
    page = report(make_run(tmp_path / "one", [before, with_text(evaluation_row(4))]), capsys)
    assert page.count("<td><b>else</b> b &amp; 0:") == 1
    assert page.count("<td><b></b> b &amp; 4:") == 1
    assert "What it writes" not in report(make_run(tmp_path / "none", rows(4)), capsys)


def test_readers_of_dark_pages_have_colours_of_their_own(tmp_path: Path, capsys: Capture) -> None:
    page = report(make_run(tmp_path / "run", rows(4)), capsys)
    assert "color-scheme: light dark" in page
    pictures = [base64.b64decode(text).decode() for text in re.findall(r"base64,([\w+/=]+)", page)]
    assert len(pictures) > 3
    for picture in pictures:
        [rules] = re.findall(r"<style>@media \(prefers-color-scheme:dark\)(.*?)</style>", picture)
        changed = re.findall(r'\[style\*="(?:fill|stroke): (#\w+)"\]', rules)
        assert "#1a1a1b" in changed
        assert "stroke: #1a1a1b" in picture, "axes that the rules would not reach"
        assert "#ffffff" not in picture, "a white ground"


def test_smoothing_forgets_and_leaves_gaps_out() -> None:
    steps = list(range(1, 201))
    values = [4.0] * 100 + [2.0] * 100
    assert smoothed((steps, values))[0] == steps
    found = smoothed((steps, values))[1]
    assert found[:100] == pytest.approx([4.0] * 100)
    assert 2.0 < found[110] < 3.0
    assert found[-1] == pytest.approx(2.0, abs=1e-3)
    assert smoothed(([1, 2, 3], [1.0, float("nan"), 3.0])) == ([1, 3], [1.0, 3.0])
    assert smoothed(([], [])) == ([], [])


def test_every_evaluation_set_has_its_curve(tmp_path: Path, capsys: Capture) -> None:
    made = [*rows(4), *(evaluation_row(step, evaluation="code") for step in (0, 4))]
    page = report(make_run(tmp_path / "run", made), capsys)
    check(page)
    assert re.search(r"evaluation loss, code</span>3\.6000<", page)
    loss = re.findall(r'<img alt="Loss" src="data:image/svg\+xml;base64,([^"]*)"', page)[0]
    assert b"code" in base64.b64decode(loss)


def test_a_run_that_has_just_begun(tmp_path: Path, capsys: Capture) -> None:
    run = make_run(tmp_path / "run", [])
    shutil.rmtree(run / "checkpoints")
    (run / "selections.jsonl").unlink()
    (run / "status.json").unlink()
    page = report(run, capsys)
    check(page)
    assert titles(page) == []
    for expected in ("No step is done yet", "No evaluation measured it", "None.", "unknown"):
        assert expected in page


@pytest.mark.parametrize("content", ["", "[]", '{"id": "x", "starts": 7}'])
def test_a_run_whose_record_is_garbled(tmp_path: Path, call: Call, content: str) -> None:
    run = make_run(tmp_path / "run", rows(4))
    for name in ("run.json", "status.json"):
        (run / name).write_text(content)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\n17")
    told = call(main, [str(run)]).err
    assert f"{run / 'run.json'} is damaged" in told
    assert "2 lines that are no rows are left out" in told


def test_text_is_escaped(tmp_path: Path, capsys: Capture) -> None:
    run = make_run(tmp_path / "run", rows(4), "tracking.name='<b>&'")
    assert "<b>" not in report(run, capsys)


@pytest.mark.thorough
def test_a_long_run_of_a_deep_model_stays_small(tmp_path: Path, capsys: Capture) -> None:
    noise = np.random.default_rng(0).normal(size=20_000)
    made = [step_row(step + 1, loss=float(value)) for step, value in enumerate(noise)]
    gates = {f"sparse_gate/layer_{layer:03}": layer / 50 for layer in range(1, 49)}
    made += [evaluation_row(step, **gates) for step in (0, 10_000, 20_000)]
    page = report(make_run(tmp_path / "run", made), capsys)
    check(page)
    assert len(page) < 2_000_000


def test_mistakes(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([str(tmp_path)]) == 2
    assert "is no run directory" in capsys.readouterr().err
    run = make_run(tmp_path / "run", rows(4))
    assert main([str(run), "--output", str(tmp_path / "nowhere" / "page.html")]) == 2
    assert "cannot write" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(run)]) == 2
    assert "drawing needs matplotlib: pip install" in capsys.readouterr().err


def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("chromium is not installed")
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(scheme: str, tmp_path: Path, capsys: Capture) -> None:
    """Pictures are decoded and not blank, nothing is wider than the window, text is readable."""
    program = browser()
    run = make_run(tmp_path / "run", eventful())
    page = report(run, capsys)
    probe = """<script>addEventListener("load", () => {
        const images = [...document.images];
        const style = getComputedStyle(document.body);
        document.title = JSON.stringify([
            images.length, images.filter(i => i.complete && i.naturalWidth > 300).length,
            document.documentElement.scrollWidth <= innerWidth, style.color,
            style.backgroundColor]);
    })</script>"""
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("</body>", probe + "</body>"))
    command = [
        program,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={'0' if scheme == 'dark' else '1'}",
        "--window-size=1300,4000",
        "--virtual-time-budget=5000",
    ]
    address = probed.as_uri()
    done = captured([*command, "--dump-dom", address], timeout=120)
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found is not None
    light, dark = '"rgb(26, 26, 26)","rgb(255, 255, 255)"', '"rgb(228, 228, 228)","rgb(23, 25, 28)"'
    assert found[1] == f"[11,11,true,{dark if scheme == 'dark' else light}]"
    picture = tmp_path / "page.png"
    captured([*command, f"--screenshot={picture}", address], timeout=120)
    image = pytest.importorskip("PIL.Image").open(picture)
    pixels = np.asarray(image.convert("L"), dtype=float)
    ground = pixels < 40 if scheme == "dark" else pixels > 250
    assert ground.mean() > 0.5, f"a {scheme} page"
    # Every band of the page that holds charts has ink on it.
    for band in np.array_split(pixels[:2400], 8):
        ink = band > 120 if scheme == "dark" else band < 200
        assert ink.sum() > 300


def test_without_a_browser_no_pictures_are_taken(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert screenshots.main([str(tmp_path), str(tmp_path), "--output", str(tmp_path / "to")]) == 2
    assert "apt-get install chromium" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


@pytest.mark.thorough
def test_pictures_are_of_what_readers_see(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    page = tmp_path / "plan.svg"
    settings = compose(["experiment=quickstart", "model.vocab_size=1000"])
    page.write_text(draw(make_overview(settings, 4)))
    corners = []
    for scheme in screenshots.SCHEMES:
        picture = image.open(io.BytesIO(screenshots.take(browser(), page, scheme)))
        assert picture.size == screenshots.SIZES["plan"]
        corners.append(picture.convert("L").getpixel((2, 2)))
    assert corners[0] > 240 > 60 > corners[1]


def test_settings_without_sections_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows(4))
    (run / "config.yaml").write_text("model: 5\n")
    with pytest.raises(ConfigError, match="must hold keys and values in sections"):
        load_run(run)
