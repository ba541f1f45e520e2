"""lm-evaluation-harness on an exported run, offline, with the task of docs/evaluation.md."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
from run_commands import ROOT, environment, run

from tests.captured import captured

pytestmark = pytest.mark.thorough


def test_the_harness_scores_an_exported_run(finished, tmp_path: Path) -> None:
    """Its log-likelihoods are those of the model, computed here without the harness."""
    exported = tmp_path / "exported"
    arguments = ["export", "--run-dir", str(finished.run_dir), "--dtype", "fp32", str(exported)]
    run(arguments, entry=("-m", "tools.convert"))

    tasks = tmp_path / "tasks"
    tasks.mkdir()
    lines = [
        {"text": f"line {number} of a small file ends with", "target": word}
        for number, word in enumerate(("one", "another", "a longer end"))
    ]
    data = tasks / "lines.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (task,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/evaluation.md").read_text(), re.DOTALL)
    (tasks / "task.yaml").write_text(task.replace("lines.jsonl", str(data)))
    captured(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "last_word"),
            *("--model_args", f"pretrained={exported},trust_remote_code=True,dtype=float32"),
            *("--include_path", str(tasks), "--device", "cpu", "--batch_size", "1"),
            *("--output_path", str(tmp_path / "scores"), "--log_samples"),
        ],
        cwd=tmp_path,
        env=environment(
            HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "home")
        ),
        timeout=300,
    )
    (results,) = (tmp_path / "scores").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["last_word"]["perplexity,none"]

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    likelihoods = []
    for line in lines:
        start = tokenizer(line["text"], add_special_tokens=False)["input_ids"]
        whole = tokenizer(f"{line['text']} {line['target']}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        ids = torch.arange(len(start), len(whole))
        likelihoods.append(logits[ids - 1, torch.tensor(whole)[ids]].sum().item())
    expected = math.exp(-sum(likelihoods) / len(likelihoods))
    assert found == pytest.approx(expected, rel=1e-4)
