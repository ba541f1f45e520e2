"""A run on text whose tokenizer begins every document with a token, and what goes on from it."""

from pathlib import Path

import pytest
from run_commands import TINY, read_json, rows, run, write_text
from tokenizers.processors import TemplateProcessing

from hysparse_megatron.data.tokenizer import train_tokenizer
from tests.captured import Call
from tools import generate

pytestmark = pytest.mark.thorough

PROMPT = "some words"


def test_samples_and_prompts_begin_with_it(seed: int, tmp_path: Path, call: Call) -> None:
    text = write_text(tmp_path / "text", seed)
    read = [file.read_text() for file in sorted(text.rglob("*")) if file.is_file()]
    tokenizer = train_tokenizer(read, 300)
    tokenizer.add_special_tokens(["<s>"])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    num_tokens = len(tokenizer.encode(PROMPT).ids)
    run_dir = tmp_path / "run"
    output = run(
        [
            *TINY,
            f"data.path={text}",
            f"data.cache_dir={tmp_path / 'cache'}",
            f"data.tokenizer={tmp_path / 'tokenizer.json'}",
            f"run_dir={run_dir}",
            "train.steps=6",
            "train.eval_interval=6",
            "tracking.sample_tokens=3",
            f"tracking.sample_prompt={PROMPT}",
        ]
    )
    assert f"documents begin with <s> (id {begin}) and end with" in output
    assert f"after evaluations {num_tokens} tokens are continued" in output
    [*_, last] = [row for row in rows(run_dir) if "sample" in row]
    assert last["sample_prompt"] == PROMPT, "what begins it is not shown"
    [manifest] = (run_dir / "checkpoints").glob("*6/manifest.json")
    assert read_json(manifest)["data"]["begin_of_document"] == begin

    given = ["--run-dir", str(run_dir), "--max-new-tokens", "3", "--ignore-end"]
    for prompt, count in ((PROMPT, num_tokens), ("", 1)):
        told = call(generate.main, [*given, "--prompt", prompt]).err
        assert f"prefill: {count} tokens" in told
