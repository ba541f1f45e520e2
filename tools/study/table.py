"""The study's table: mean and spread over seeds, and differences from the baseline by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .plan import Study
from .results import Result, read_result

_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % of Student's t with 1, 2, ... degrees of freedom."""
_NORMAL = 1.96


def render(study: Study, results: Path) -> str:
    """Markdown, from what is finished; a dash stands for what is not."""
    found = {run.name: read_result(results, run) for run in study.runs}
    by_variant = {
        variant: {seed: found[f"{variant}-seed{seed}"] for seed in study.seeds}
        for variant in study.variants
    }
    done = sum(result is not None for result in found.values())
    hours = sum(result.seconds for result in found.values() if result) / 3600
    lines = [
        f"{study.name}: {done} of {len(found)} runs of {study.tokens:,} tokens, {hours:.1f} hours",
        "",
        "| variant | seeds | " + " | ".join(study.metrics) + " | tokens/s |",
        "|---|---|" + "---|" * (len(study.metrics) + 1),
    ]
    for variant, seeds in by_variant.items():
        finished = [result for result in seeds.values() if result]
        diverged = sum(bool(result.stopped) for result in finished)
        count = f"{len(finished)}" + (f", {diverged} diverged" if diverged else "")
        cells = [_mean(_values(seeds, where)) for where in study.metrics.values()]
        speeds = [result.tokens_per_second for result in finished]
        speed = f"{statistics.mean(speeds):,.0f}" if speeds else "-"
        lines.append(f"| {variant} | {count} | {' | '.join(cells)} | {speed} |")
    lines += ["", f"Difference from {study.baseline}, seed by seed (mean, 95 % interval):", ""]
    lines += [
        "| variant | " + " | ".join(study.metrics) + " |",
        "|---|" + "---|" * len(study.metrics),
    ]
    for variant in study.variants:
        if variant != study.baseline:
            cells = list(_differences(study, by_variant[variant], by_variant[study.baseline]))
            lines.append(f"| {variant} | {' | '.join(cells)} |")
    for name, result in found.items():
        if result and result.stopped:
            lines += ["", f"{name} diverged and was not evaluated: {result.stopped}"]
    return "\n".join(lines)


def _differences(
    study: Study, ours: dict[int, Result | None], base: dict[int, Result | None]
) -> Iterator[str]:
    for where in study.metrics.values():
        mine, theirs = _values(ours, where), _values(base, where)
        pairs = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
        yield _interval(pairs)


def _values(seeds: dict[int, Result | None], where: str) -> dict[int, float]:
    """The number at `where` of every evaluated seed."""
    return {
        seed: lookup(result.evaluations, where)
        for seed, result in seeds.items()
        if result and not result.stopped
    }


def lookup(evaluations: dict[str, Any], where: str) -> float:
    """The number at a path like `code.loss.0.all.loss`."""
    value: Any = evaluations
    for part in where.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return float(value)


def _mean(values: dict[int, float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values.values()):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values.values()):.4f}{spread}"


def _interval(pairs: Sequence[float]) -> str:
    """Mean of paired differences with its 95 % interval; without one for a single pair."""
    if not pairs:
        return "-"
    mean = statistics.mean(pairs)
    if len(pairs) == 1:
        return f"{mean:+.4f} (one seed)"
    quantile = _QUANTILES[len(pairs) - 2] if len(pairs) - 2 < len(_QUANTILES) else _NORMAL
    half = quantile * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"
