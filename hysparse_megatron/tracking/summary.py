"""`summary.md`: what a finished run reached, and what to do next."""

from __future__ import annotations

from hysparse_megatron.config.schema import Config
from hysparse_megatron.rundir import RunDirectory
from hysparse_megatron.tracking.metrics import read_metrics


def write_summary(config: Config, directory: RunDirectory, tokenizer_path: str) -> str:
    """Write `summary.md` and return its text."""
    rows = read_metrics(directory.metrics)
    evaluations = [row for row in rows if "eval_loss" in row]
    steps = [row for row in rows if "loss" in row]
    first, last = evaluations[0]["eval_loss"], evaluations[-1]["eval_loss"]
    seconds = sum(row["step_seconds"] for row in steps)
    speed = sorted(row["tokens_per_second"] for row in steps)[len(steps) // 2]
    text = f"""# {config.name}

* {config.train.steps} steps, {steps[-1]["tokens"]:,} tokens in {seconds / 60:.1f} minutes of \
training, median {speed:,.0f} tokens/s
* evaluation loss {first:.4f} at step {evaluations[0]["step"]} -> {last:.4f} at step \
{evaluations[-1]["step"]} ({100 * (last / first - 1):+.1f} %)
* metrics: `{directory.metrics}`, checkpoints: `{directory.checkpoints}`

What to do next:

    # train on
    make train ARGS="run_dir={directory.path} train.steps={2 * config.train.steps}"
    # the same model with full attention everywhere, and with windows instead of sparse layers
    make train ARGS="name=full model.layout='5*F | 4*F'"
    make train ARGS="name=hybrid_swa model.layout='F 3*W F | 3*W F'"
    # start from these weights in one process, with other data
    .venv/bin/python -m hysparse_megatron name=tuned checkpoint.load={directory.path} \\
        data.path=FILE_OR_FOLDER data.tokenizer={tokenizer_path}
"""
    (directory.path / "summary.md").write_text(text)
    return text
