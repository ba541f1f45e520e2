"""One self-contained HTML page about a run: `hysparse report RUN [--output FILE]`.

    hysparse report runs/quickstart

Curves, speed, restarts, checkpoints, what the architecture does, which blocks queries read, and the
configuration, from what the run directory holds; also while the run goes on. Needs the extra
`report`. The page goes to RUN/report.html unless told otherwise.

Ends with 0, or with 2 if the path is no run or nothing can be drawn.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from hysparse_megatron.command import command, make_parser
from hysparse_megatron.files import require_writable, writing
from hysparse_megatron.tracking.selections import read_selections

from .charts import Line, Marks, Selection, line_chart, selection_chart
from .page import Page
from .run_data import RunData, load_run, points, smoothed

QUANTITIES = (
    ("oracle_mass", "Oracle mass inside the selection", "share of the softmax"),
    ("neighbour_agreement", "Agreement of neighbouring queries", "share of blocks"),
    ("sparse_gate", "Gate of the sparse branch", "mean"),
    ("window_gate", "Gate of the window branch", "mean"),
    ("sparse_sink", "Sink of the sparse branch", "mean logit"),
    ("window_sink", "Sink of the window branch", "mean logit"),
    ("shared_sink", "Sink of both branches", "mean logit"),
)
"""Fields of evaluations by layer, their titles and units."""

MAX_PICTURES = 12
"""Oracles whose selections are drawn: evenly many of a deep model."""


MAX_SAMPLES = 6
"""Evaluations whose texts are shown."""


@command
def main(argv: Sequence[str]) -> int:
    """Do what `argv` says, the command line without the program's name."""
    parser = make_parser("hysparse report", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: RUN/report.html")
    args = parser.parse_args(list(argv))
    path = args.output or args.run / "report.html"
    run = load_run(args.run)
    require_writable(path, "--output")
    with writing(path, "--output"):
        write_report(run, path)
    print(path)
    return 0


def write_report(run: RunData, path: Path) -> None:
    """Write the page. Raises ConfigError without matplotlib, OSError if it cannot be written."""
    page = Page(run.name)
    _overview(page, run)
    _curves(page, run)
    _samples(page, run)
    _speed(page, run)
    _architecture(page, run)
    _selections(page, run)
    _starts(page, run)
    _checkpoints(page, run)
    page.heading("Configuration")
    page.fold("config.yaml", yaml.safe_dump(run.config, sort_keys=False))
    page.write(path)


def _overview(page: Page, run: RunData) -> None:
    total = run.config.get("train", {}).get("steps", "?")
    last = run.steps[-1] if run.steps else {}
    state = run.status.get("state", "unknown")
    cause = run.status.get("cause")
    page.note(f"{run.path}, id {run.record.get('id', 'unknown')}: {state}. {cause or ''}")
    speeds = points(run.steps, "tokens_per_second")[1]
    per_gpu = points(run.steps, "tokens_per_second_per_gpu")[1]
    mfu = points(run.steps, "mfu")[1]
    memory = points(run.steps, "peak_memory_bytes")[1]
    losses = points(run.evaluations, "eval_loss")[1]
    smooth = smoothed(points(run.steps, "loss"))[1]
    skipped = sum(bool(row.get("skipped")) for row in run.steps)
    facts = [
        ("step", f"{last.get('step', 0):,} of {total}"),
        ("tokens", f"{last.get('tokens', 0):,}"),
        ("loss, smoothed", f"{smooth[-1]:.4f}" if smooth else "none yet"),
        ("evaluation loss", f"{losses[-1]:.4f}" if losses else "none"),
        *(
            (f"evaluation loss, {name}", f"{rows[-1]['eval_loss']:.4f}")
            for name, rows in run.named_evaluations.items()
        ),
        ("tokens/s, median", f"{statistics.median(speeds):,.0f}" if speeds else "none yet"),
    ]
    if per_gpu:
        facts.append(("tokens/s a rank", f"{statistics.median(per_gpu):,.0f}"))
    if mfu:
        facts.append(("MFU, median", f"{100 * statistics.median(mfu):.1f} %"))
    if memory:
        facts.append(("peak memory of a rank", f"{max(memory) / 2**30:.2f} GiB"))
    facts.append(("restarts", str(max(0, len(run.starts) - 1))))
    facts.append(("skipped steps", str(skipped)))
    page.facts(facts)
    page.table(("", ""), _what_ran(run))


def _what_ran(run: RunData) -> list[tuple[str, str]]:
    """Model, layout, split, device and versions, as far as the run directory knows them."""
    model, parallel = run.config.get("model", {}), run.config.get("parallel", {})
    start = run.starts[-1] if run.starts else {}
    sizes = ("hidden_size", "num_attention_heads", "num_query_groups", "block_size", "window")
    told = [f"{name.replace('_', ' ')} {model[name]}" for name in sizes if name in model]
    split = [f"{name} {parallel.get(name) or 1}" for name in ("tp", "pp", "vpp", "cp", "ep")]
    if (start.get("ranks") or 0) > 0:
        split.insert(0, f"{start['ranks']} rank{'s' if start['ranks'] > 1 else ''}")
    versions = ", ".join(f"{name} {found}" for name, found in start.get("versions", {}).items())
    return [
        ("layout", str(model.get("layout", "unknown"))),
        ("model", ", ".join(told) or "unknown"),
        ("split", ", ".join(split)),
        ("device", f"{start.get('device', 'unknown')} on {start.get('host', 'unknown')}"),
        ("precision", str(run.config.get("train", {}).get("precision", "unknown"))),
        ("versions", versions or "unknown"),
    ]


def _marks(run: RunData) -> list[Marks]:
    """Restarts, by the first step that has one more, and skipped steps."""
    restarts = [
        after["step"]
        for before, after in itertools.pairwise(run.steps)
        if after.get("restarts", 0) > before.get("restarts", 0)
    ]
    skipped = [row["step"] for row in run.steps if row.get("skipped")]
    marks = [Marks("restart", restarts, "#888888"), Marks("skipped step", skipped, "#d55e00")]
    return [mark for mark in marks if mark.steps]


def _curves(page: Page, run: RunData) -> None:
    page.heading("Training")
    if not run.steps:
        page.note("No step is done yet.")
        return
    marks = _marks(run)
    sets = {"evaluation": run.evaluations, **run.named_evaluations}
    loss = [
        Line("training", *points(run.steps, "loss"), colour=0, faint=True),
        Line("training, smoothed", *smoothed(points(run.steps, "loss")), colour=0),
        *(
            Line(name, *points(rows, "eval_loss"), colour=number, markers=True)
            for number, (name, rows) in enumerate(sets.items(), start=1)
            if rows
        ),
    ]
    norms = [Line("gradient norm", *points(run.steps, "grad_norm"))]
    rates = [Line("learning rate", *points(run.steps, "learning_rate"))]
    page.note(
        "Both losses are the mean cross-entropy per token, in nats: of training on each step's "
        "batch before its update, of evaluation on held-out text, the same every time."
    )
    page.charts(
        [
            line_chart("Loss", loss, y_label="nats per token", marks=marks),
            line_chart("Gradient norm", norms, y_label="norm", logarithmic=True, marks=marks),
            line_chart("Learning rate", rates, y_label="learning rate"),
        ]
    )


def _samples(page: Page, run: RunData) -> None:
    found = [row for row in run.evaluations if "sample" in row]
    if not found:
        return
    page.heading("What it writes")
    prompt = found[-1]["sample_prompt"]
    page.note(
        "After evaluations, the likeliest token each time (tracking.sample_tokens). Given was:"
    )
    page.text(prompt)
    # Evenly many of a long run, the last one always.
    last, count = len(found) - 1, min(len(found), MAX_SAMPLES)
    shown = [found[last * n // max(count - 1, 1)] for n in range(count - 1)] + [found[last]]
    # Another prompt, of an earlier start, stands before its text.
    others = [row["sample_prompt"] if row["sample_prompt"] != prompt else "" for row in shown]
    steps = [f"{row['step']:,}" for row in shown]
    texts = [row["sample"] for row in shown]
    page.texts(("step", "text"), list(zip(steps, others, texts, strict=True)))


def _speed(page: Page, run: RunData) -> None:
    if not run.steps:
        return
    page.heading("Speed")
    marks = _marks(run)
    images = [
        line_chart(
            "Tokens a second",
            [Line("all ranks", *points(run.steps, "tokens_per_second"))],
            y_label="tokens/s",
            marks=marks,
        )
    ]
    tflops = points(run.steps, "tflops_per_gpu")
    if tflops[0]:
        lines = [Line("TFLOP/s", *tflops)]
        images.append(line_chart("Model FLOPs of a rank", lines, y_label="TFLOP/s", marks=marks))
    mfu = points(run.steps, "mfu")
    if mfu[0]:
        lines = [Line("MFU", mfu[0], [100 * value for value in mfu[1]])]
        images.append(line_chart("Model FLOPs utilisation", lines, y_label="%", marks=marks))
    told = [row for row in run.steps if "slowest_ranks" in row]
    if len(told) > 1:
        lines = [
            Line(name, *points(told, f"forward_seconds_{name}"), markers=True)
            for name in ("min", "median", "max")
        ]
        images.append(line_chart("Forward passes of the ranks, a step", lines, y_label="seconds"))
    page.charts(images)
    if told:
        page.note(f"Slowest ranks, as told after step {told[-1]['step']}:")
        page.table(
            ("rank", "host", "seconds a step", "medians of its stage"),
            [
                (e["rank"], e["host"], f"{e['seconds']:.4f}", f"{e['medians']:.2f}")
                for e in told[-1]["slowest_ranks"]
            ],
        )


def _architecture(page: Page, run: RunData) -> None:
    page.heading("Architecture")
    values = run.layer_values()
    if not values:
        page.note("No evaluation measured it: see tracking.architecture.")
        return
    page.charts(
        [
            line_chart(
                title,
                [
                    Line(f"layer {layer}", steps, means, layer=layer, markers=len(steps) < 40)
                    for layer, (steps, means) in sorted(values[quantity].items())
                ],
                y_label=unit,
            )
            for quantity, title, unit in QUANTITIES
            if quantity in values
        ]
    )


def _selections(page: Page, run: RunData) -> None:
    recorded = read_selections(run.path)
    if not recorded:
        return
    step = max(recorded)
    row = recorded[step]
    page.heading(f"What queries read, after step {step}")
    page.note(
        "The sampled queries of one held-out sequence, as the last evaluation recorded them: the "
        "blocks that the first KV group of an oracle selects (dark), out of what the query may see "
        "(light). The sparse layers after the oracle read these and their window."
    )
    starts, size = row["document_starts"], row["block_size"]
    layers = sorted(row["layers"])
    shown = [layers[len(layers) * n // MAX_PICTURES] for n in range(MAX_PICTURES)]
    page.charts(
        [
            selection_chart(
                f"Oracle at layer {layer}",
                Selection(row["positions"], starts, row["layers"][layer], size),
            )
            for layer in dict.fromkeys(shown)
        ]
    )


def _starts(page: Page, run: RunData) -> None:
    page.heading("Starts")
    rows = []
    for start in run.starts:
        git = start.get("git") or {}
        commit = str(git.get("commit", ""))[:12]
        changed = f", changed: {git.get('diff', 'no diff kept')}" if git.get("dirty") else ""
        rows.append(
            (
                start.get("time"),
                start.get("host"),
                start.get("cluster"),
                start.get("slurm_job"),
                f"{commit}{changed}",
                str(start.get("config_hash", ""))[:12],
            )
        )
    page.table(("time (UTC)", "host", "cluster", "Slurm job", "code", "configuration"), rows)


def _checkpoints(page: Page, run: RunData) -> None:
    page.heading("Checkpoints")
    if not run.checkpoints:
        page.note("None.")
        return
    page.table(
        ("step", "tokens", "size", "state"),
        [
            (
                found.step,
                f"{found.manifest.get('tokens', 0):,}",
                f"{found.num_bytes / 1e6:,.1f} MB",
                found.problem or "complete",
            )
            for found in run.checkpoints
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
