"""`python -m tools.generate` on a finished run: text, speed and bytes, stops, seeds, mistakes."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from run_commands import run

from tools.generate import main

pytestmark = pytest.mark.thorough

TOOL = ("-m", "tools.generate")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", *TOOL)
PROMPT = "some words"
CACHE = re.compile(
    r"([\d,]+) bytes measured .*\n +planner: ([\d,]+) bytes.*\n.*full: ([\d,]+) bytes"
)
SPEED = re.compile(
    r"^(?:prefill|decode): (\d+) tokens in [\d.]+ s, [\d,.]+ tokens/s(?:$| \()", re.M
)


@pytest.fixture
def generate(finished, capsys: pytest.CaptureFixture[str]):
    """Runs the tool in this process: exit code, standard output, standard error."""

    def call(*arguments: str, run_dir: Path = finished.run_dir) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["--run-dir", str(run_dir), *arguments])
        return code, *capsys.readouterr()

    return call


def test_without_a_prompt_a_document_is_begun(generate) -> None:
    code, text, told = generate("--max-new-tokens", "8", "--ignore-end")
    assert code == 0, told
    assert text == generate("--prompt", "", "--max-new-tokens", "8", "--ignore-end")[1]
    assert "prefill: 1 tokens" in told


def numbers(*texts: str) -> list[int]:
    return [int(text.replace(",", "")) for text in texts]


def test_greedy_text_speed_and_bytes(generate) -> None:
    arguments = ("--prompt", PROMPT, "--max-new-tokens", "20", "--ignore-end")
    code, text, told = generate(*arguments)
    assert code == 0, told
    assert len(text) > 20
    assert generate(*arguments)[1] == text
    prefill, decode = map(int, SPEED.findall(told))
    assert prefill > 1
    assert decode == 19
    if not torch.cuda.is_available():
        assert "tokens/s (no graph: there is no CUDA device)\n" in told
    measured, planned, full = numbers(*CACHE.search(told).groups())
    # Two full layers and a sparse one with a window of 8, of 16 + 16 fp32 numbers a token.
    tokens = prefill + 19
    assert measured == planned == 128 * (2 * tokens + 8)
    assert full == 128 * 3 * tokens
    assert f"{full / measured:.2f} times as much" in told


def test_pieces_of_the_prompt_change_nothing(generate) -> None:
    prompt = " ".join(f"word{number} of many" for number in range(12))
    texts = {
        generate("--prompt", prompt, "--max-new-tokens", "12", "--prefill-chunk", chunk)[1]
        for chunk in ("1", "7", "1000")
    }
    assert len(texts) == 1


def test_a_seed_repeats(generate) -> None:
    drawn = ("--prompt", PROMPT, "--max-new-tokens", "24", "--temperature", "1.2", "--seed")
    first, again, other = (generate(*drawn, seed)[1] for seed in ("3", "3", "4"))
    assert first == again != other


def test_a_stop_string_ends_a_text(generate) -> None:
    arguments = ("--prompt", PROMPT, "--max-new-tokens", "30", "--ignore-end")
    whole = generate(*arguments)[1]
    stop = whole[9:12]
    code, text, told = generate(*arguments, "--stop", "never said", "--stop", stop)
    assert code == 0
    assert text == whole[: whole.index(stop)] + "\n"
    assert int(re.search(r"decode: (\d+) tokens", told)[1]) < 29


def test_several_prompts_are_continued_together(generate, tmp_path: Path) -> None:
    """Each as it is alone; the empty one begins a document."""
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\nanother and longer one\n")
    settings = ("--max-new-tokens", "9", "--ignore-end")
    code, text, told = generate("--prompts-file", str(tmp_path / "prompts.txt"), *settings)
    assert code == 0
    assert "3 sequence(s)" in told
    parts = re.split(r"^== prompt \d: '.*'\n", text, flags=re.M)
    alone = [generate("--prompt", p, *settings)[1] for p in (PROMPT, "", "another and longer one")]
    assert parts == ["", *alone]


def test_a_prompt_is_a_line_of_the_file(generate, tmp_path: Path) -> None:
    """Whatever else ends lines for Python, such as the form feeds of old source files."""
    lines = ["a\x0cb\x1cc", "d\u2028e", "f"]
    (tmp_path / "prompts.txt").write_text("\r\n".join(lines), newline="")
    code, text, told = generate(
        "--prompts-file", str(tmp_path / "prompts.txt"), "--max-new-tokens", "1"
    )
    assert code == 0, told
    shown = re.findall(r"^== prompt \d: (.*)\n", text, flags=re.M)
    assert shown == list(map(repr, lines))


def test_any_checkpoint_by_name(generate, finished) -> None:
    settings = ("--prompt", PROMPT, "--max-new-tokens", "16", "--ignore-end")
    newest = generate(*settings)[1]
    directory = finished.run_dir / "checkpoints" / "step-00000040"
    assert generate(*settings, "--checkpoint", str(directory))[1] == newest
    assert generate(*settings, "--checkpoint", "40", "--no-verify")[1] == newest
    assert generate(*settings, "--checkpoint", "20")[0] == 0


def test_a_cache_in_fp8_is_smaller(generate) -> None:
    settings = ("--prompt", PROMPT, "--max-new-tokens", "40", "--ignore-end", "--cache-dtype")
    sizes = []
    for kind in ("model", "bf16", "fp8"):
        code, text, told = generate(*settings, kind)
        assert code == 0
        assert len(text) > 20
        sizes.append(numbers(CACHE.search(told)[1])[0])
    ring = 128 * 8
    whole, half, quarter = (size - ring for size in sizes)
    assert half == whole // 2
    assert quarter == whole // 4 * (8 + 1) // 8  # one exponent for 8 channels


def test_what_cannot_be_is_said(generate, finished, tmp_path: Path) -> None:
    def told(code: int, *arguments: str, **where: Path) -> str:
        found, text, error = generate(*arguments, **where)
        assert (found, text) == (code, "")
        assert len(error.strip().splitlines()) <= 2, error
        return error

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is no run directory" in told(2, "--prompt", "x", run_dir=empty)
    (tmp_path / "no_lines.txt").touch()
    assert "no line to continue" in told(2, "--prompts-file", str(tmp_path / "no_lines.txt"))
    assert "missing.txt" in told(2, "--prompts-file", str(tmp_path / "missing.txt"))
    assert "an empty text" in told(2, "--prompt", "x", "--stop", "")
    long = told(2, "--prompt", "x", "--max-new-tokens", "2" + "0" * 9)
    assert "need a cache of" in long
    assert "step-00000035 is damaged or missing" in told(6, "--prompt", "x", "--checkpoint", "35")
    shutil.copy(finished.run_dir / "config.yaml", empty)
    assert "no valid checkpoint" in told(6, "--prompt", "x", run_dir=empty)
    (tmp_path / "tokenizer.json").write_text("{}")
    other = told(5, "--prompt", "x", "--tokenizer", str(tmp_path))
    assert "is not the tokenizer that this run was trained with" in other


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-new-tokens", "0"],
        ["--temperature", "-1"],
        ["--temperature", "warm"],
        ["--top-p", "0"],
        ["--top-p", "1.5"],
        ["--top-p", "0.9"],
        ["--prompt", "\udcff"],
        ["--stop", "\udcff"],
        ["--prefill-chunk", "none"],
        ["--cache-dtype", "fp4"],
    ],
    ids=" ".join,
)
def test_numbers_that_cannot_be(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run-dir", "anywhere", "--prompt", "x", *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.distributed
def test_two_tensor_ranks_say_the_same(generate, finished) -> None:
    arguments = ["--prompt", PROMPT, "--max-new-tokens", "10", "--ignore-end"]
    code, alone, _ = generate(*arguments)
    assert code == 0
    of_run = ["--run-dir", str(finished.run_dir)]
    output = run([*of_run, *arguments], entry=TORCHRUN)
    assert alone in output
    assert output.count("decode: 9 tokens") == 1, "only one rank speaks"
    output = run([*of_run, "--prompt", "x", "--checkpoint", "3"], entry=TORCHRUN, code=1)
    assert output.count("step-00000003 is damaged or missing") == 1
