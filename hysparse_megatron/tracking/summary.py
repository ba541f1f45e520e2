"""`summary.md`: what a finished run reached, and what to do next."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from typing import Any

from hysparse_megatron.command import hysparse
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.overrides import changes
from hysparse_megatron.config.parallel import resized
from hysparse_megatron.config.schema import VALIDATION, Config
from hysparse_megatron.continuation import changed_rate
from hysparse_megatron.files import write_whole
from hysparse_megatron.rundir import RunDirectory
from hysparse_megatron.tracking.metrics import by_evaluation, read_metrics

_OF_ONE_START = (
    "checkpoint.step",
    "checkpoint.resume",
    "checkpoint.accept_changed_data",
    "optim.accept_schedule_change",
)
"""Settings that say where one start goes on from, or what may have changed before it."""


def write_summary(
    config: Config,
    directory: RunDirectory,
    tokenizer_path: str,
    num_ranks: int,
    overrides: Sequence[str],
) -> str:
    """Write `summary.md` and return its text. `overrides` are those of the command that ran."""
    rows = read_metrics(directory.metrics)
    text = f"""# {config.name}

{_steps(config, [row for row in rows if "loss" in row])}
{_evaluations(rows)}
* metrics: `{directory.metrics}`, checkpoints: `{directory.checkpoints}`

Use it, and look at it:

{_uses(directory)}

Train on, or something else:

"""
    text += _suggestions(config, directory, tokenizer_path, num_ranks, overrides)
    write_whole(directory.path / "summary.md", text)
    return text


def _steps(config: Config, steps: Sequence[dict[str, Any]]) -> str:
    if not steps:
        return "* no steps: metrics.jsonl was lost"
    seconds = sum(row["step_seconds"] for row in steps)
    speed = sorted(row["tokens_per_second"] for row in steps)[len(steps) // 2]
    return (
        f"* {config.train.steps} steps, {steps[-1]['tokens']:,} tokens in {seconds / 60:.1f} "
        f"minutes of training, median {speed:,.0f} tokens/s"
    )


def _evaluations(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each set that was evaluated on: its first loss and its last."""
    lines = []
    for name, found in by_evaluation(rows).items():
        last = found[-1]
        # Of as many tokens: a later start may evaluate on other samples.
        first = next(r for r in found if r.get("eval_tokens") == last.get("eval_tokens"))
        told = "evaluation" if name == VALIDATION else f"evaluation on {name}:"
        change = last["eval_loss"] / first["eval_loss"] - 1
        line = f"* {told} loss {first['eval_loss']:.4f} at step {first['step']} -> "
        line += f"{last['eval_loss']:.4f} at step {last['step']} ({100 * change:+.1f} %)"
        if "eval_tokens" in last:
            tokens, perplexity = last["eval_tokens"], last["eval_perplexity"]
            line += f", perplexity {perplexity:,.2f} over {tokens:,} held-out tokens"
        lines.append(line)
    return "\n".join(lines) or "* no evaluation: train.eval_batches is 0"


def _uses(directory: RunDirectory) -> str:
    """Commands of one line, for the shell."""
    run = shlex.quote(str(directory.path))
    exported = shlex.quote(f"exported/{directory.path.name}")
    return f"""    {hysparse()} generate --run-dir {run} --max-new-tokens 64
    {hysparse()} evaluate --run-dir {run}
    {hysparse()} convert export --run-dir {run} {exported}
    {hysparse()} report {run}"""


def _suggestions(
    config: Config,
    directory: RunDirectory,
    tokenizer_path: str,
    num_ranks: int,
    overrides: Sequence[str],
) -> str:
    """Commands that go on from this run."""
    steps = config.train.steps
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2 * steps))
    rates = changed_rate(config, longer, steps)
    if compose(list(overrides)) != config:  # it came from a frozen file
        also = " and set optim.accept_schedule_change: true" if rates else ""
        return f"""    # train on: raise train.steps{also} in the file, then
    {hysparse()} launch --nproc {num_ranks} \\
        --config {shlex.quote(f"{directory.path}/config.yaml")}
"""
    local = f"{hysparse()} launch --nproc {num_ranks}"
    own = ("name", "run_dir", "checkpoint.load")
    # Another text has other datasets and steps.
    reading = ("data.path", "data.blend", "data.skip_steps", "data.tokenizer")
    layout = config.model.layout
    full, windows = (
        shlex.quote(f"model.layout={layout.replace('S', kind)}") for kind in ("F", "W")
    )
    single = shlex.quote(f"model.layout={layout.replace('|', '')}")
    alone = changes("parallel", config.parallel, resized(config.parallel))
    one_process = " ".join([single, *(f"{key}={value}" for key, value in alone.items())])
    weights = _override("checkpoint.load", str(directory.path))
    tokenizer = _override("data.tokenizer", tokenizer_path)
    told, accept = "", ""
    if rates:
        told = f"; its learning rate goes from {rates[0]:.3g} to {rates[1]:.3g}"
        accept = " optim.accept_schedule_change=true"
    return f"""    # train on: the newest checkpoint is found and continued{told}
    {local} {_without(overrides)} train.steps={2 * steps}{accept}
    # the same model with full attention everywhere, and with windows instead of sparse layers
    {local} {_without(overrides, *own)} name={config.name}-full {full}
    {local} {_without(overrides, *own)} name={config.name}-windows {windows}
    # start from these weights in one process, on your own text
    {hysparse()} train {_without(overrides, *own, *reading)} name={config.name}-tuned \\
        {one_process} \\
        {weights} data.path=FILE_OR_FOLDER {tokenizer}
"""


def _without(overrides: Sequence[str], *keys: str) -> str:
    """All but those of `keys`, and those that were meant for one start."""
    return shlex.join(
        override
        for override in overrides
        if override.lstrip("+").partition("=")[0] not in (*_OF_ONE_START, *keys)
    )


def _override(key: str, path: str) -> str:
    """A path as a setting, in quotes of the settings' grammar and of the shell where it needs."""
    if re.fullmatch(r"[\w./-]+", path):
        return f"{key}={path}"
    escaped = path.replace("'", "\\'")
    return shlex.quote(f"{key}='{escaped}'")
