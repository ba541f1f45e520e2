"""Checks that need no other rank: packages, GPUs, data, disk, run directory, tracker, scheduler.

Imports no torch, so that a login node answers in seconds.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence

from packaging.requirements import Requirement

from hysparse_megatron.architecture.model import Layers
from hysparse_megatron.checkpoint.store import published, step_of
from hysparse_megatron.config.blend import parse_blend
from hysparse_megatron.config.cluster import Scheduler
from hysparse_megatron.config.rules.tracking import has_wandb_key
from hysparse_megatron.config.schema import Config, DataConfig, Precision, TrackingMode
from hysparse_megatron.data.card import CARD_NAME, load_prepared
from hysparse_megatron.data.prepare.sources import list_sources, standard_library
from hysparse_megatron.data.sources import MANY_EPOCHS, count_of, epochs
from hysparse_megatron.errors import DataError
from hysparse_megatron.plan.overview import Overview
from hysparse_megatron.rundir import holder

from .findings import Finding, fail, ok, warn

_PACKAGE = "hysparse-megatron"
_LARGE_TEXT = 100 * 2**20
"""Bytes of raw text from which preparing it beforehand is worth a word."""
_BYTES_PER_TOKEN = 4
"""Of text that nobody has prepared yet; by language and tokenizer 2 to 5."""


def login_checks(config: Config, overview: Overview) -> list[Finding]:
    """Everything that one process can find out where the run is submitted."""
    checks: list[Iterator[Finding]] = [
        packages(config),
        gpus(config),
        data(config),
        disk(config, overview),
        run_directory(config),
        tracker(config),
        scheduler(config),
    ]
    return [finding for check in checks for finding in check]


def node_checks(config: Config) -> list[Finding]:
    """What may differ from machine to machine of one run."""
    return [
        finding for check in (packages(config), gpus(config), data(config)) for finding in check
    ]


def packages(config: Config) -> Iterator[Finding]:
    """Required packages in their ranges, and the optional ones with what their lack costs."""
    found = []
    for text in importlib.metadata.requires(_PACKAGE) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            got = version or "not installed"
            yield fail("packages", f"{requirement.name} {got}", f"pip install '{requirement}'")
        elif requirement.name in ("torch", "megatron-core"):
            found.append(f"{requirement.name} {version}")
    yield ok("packages", ", ".join(found))
    for_gpus = config.train.precision is Precision.bf16
    te = _version("transformer-engine")
    if te is not None:
        yield ok("packages", f"transformer-engine {te}")
    elif config.model.layers is Layers.te:
        yield fail(
            "packages", "model.layers=te, but no transformer-engine", "pip install '.[te]' there"
        )
    elif for_gpus and config.model.layers is Layers.auto:
        fix = "pip install '.[te]' for fused norms, grouped matrix products of experts and FP8"
        yield warn("packages", "no transformer-engine: megatron-core's local layers", fix)
    if for_gpus and te is None and importlib.util.find_spec("amp_C") is None:
        fix = "build NVIDIA's apex from source if that matters (PyPI's `apex` is something else)"
        yield warn("packages", "no apex: weight gradients are not accumulated in the matmul", fix)


def gpus(config: Config) -> Iterator[Finding]:
    """GPUs and driver of this machine, as nvidia-smi tells them."""
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        yield ok("GPUs", "none on this machine")
        return
    wanted = config.cluster.ranks_per_node or config.cluster.gpus_per_node
    named = f"{len(told)} x {told[0]}" if told else "none that the driver can see"
    if config.cluster.scheduler is Scheduler.slurm and len(told) < wanted:
        yield warn("GPUs", named, f"{wanted} ranks a node need as many GPUs there")
    else:
        yield ok("GPUs", named)


def data(config: Config) -> Iterator[Finding]:
    """Prepared datasets whole and with their tokenizer; raw text announced; enough for the run."""
    settings = config.data
    for held_out in settings.evaluation.values():
        yield _prepared(config, held_out)[0] if _is_prepared(held_out) else _raw(held_out)
    parts: Sequence[tuple[float, str | None]] = [(1.0, settings.path)]
    if settings.blend is not None:
        parts = parse_blend(settings.blend)
    sizes = []
    for _, path in parts:
        if path is not None and _is_prepared(path):
            finding, tokens = _prepared(config, path)
        else:
            finding, tokens = _raw(path), _tokens_of_text(path, settings)
        yield finding
        sizes.append(tokens)
    if all(sizes):
        yield _epochs(config, epochs(config.train.tokens, sizes, [weight for weight, _ in parts]))


def _is_prepared(path: str) -> bool:
    return os.path.exists(os.path.join(path, CARD_NAME))


def _prepared(config: Config, folder: str) -> tuple[Finding, int]:
    """What is found in the folder, and how many training tokens; 0 if it cannot be used."""
    fix = "prepare it again with hysparse prepare-data, or restore the file"
    try:
        corpus = load_prepared(folder, check_tokens=False)
    except DataError as error:
        return fail("data", str(error), fix), 0
    limit = config.model.vocab_size
    if limit is not None and corpus.num_ids > limit:
        fix = "raise model.vocab_size, or leave it out"
        found = f"{folder}: {corpus.num_ids} token ids, model.vocab_size is {limit}"
        return fail("data", found, fix), 0
    tokens = f"{corpus.train_tokens:,} tokens in {corpus.train_documents:,} documents"
    hashes = f"fingerprint {corpus.fingerprint[:12]}, tokenizer {corpus.tokenizer_sha256[:12]}"
    return ok("data", f"{folder}: {tokens}, {hashes}"), corpus.train_tokens


def _raw(path: str | None) -> Finding:
    if path is None:
        return ok("data", "the sample text that ships with Python")
    size = _text_bytes(path)
    found = f"{path}: {size / 1e6:,.0f} MB of text, prepared when the run starts"
    if size > _LARGE_TEXT:
        fix = "hysparse prepare-data does it once, by all cores, before any GPU waits"
        return warn("data", found, fix)
    return ok("data", found)


def _text_bytes(path: str | None) -> int:
    sources = standard_library()[0] if path is None else list_sources([path])
    return sum(source.size_bytes for source in sources)


def _tokens_of_text(path: str | None, settings: DataConfig) -> int:
    """About how many training tokens a text has that is not prepared yet."""
    return int(_text_bytes(path) * (1 - settings.validation_fraction) / _BYTES_PER_TOKEN)


def _epochs(config: Config, times: float) -> Finding:
    found = f"the run's {config.train.tokens:,} tokens read it about {count_of(times)} times"
    if times <= MANY_EPOCHS:
        return ok("data", found)
    return warn(
        "data",
        found,
        f"more data or fewer train.steps: beyond {MANY_EPOCHS:g} times text teaches less",
    )


def disk(config: Config, overview: Overview) -> Iterator[Finding]:
    """Room for the checkpoints that will be kept, and the one being written."""
    existing = config.run_path.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    one = overview.checkpoint_bytes
    found = f"{free / 1e9:,.1f} GB free, a checkpoint takes {one / 1e9:,.2f} GB"
    there = len(published(config.run_path / "checkpoints"))
    most = _most_checkpoints(config)
    if free < one:
        yield fail("disk", found, f"free space at {existing}, or choose another run_dir")
    elif free < (most - min(there, most - 1)) * one:
        fix = f"checkpoint.keep={config.checkpoint.keep} needs room for {most}"
        fix += f", of which {there} are there" if there else ""
        yield warn("disk", found, f"{fix}: lower it, or free space")
    else:
        yield ok("disk", found)


def _most_checkpoints(config: Config) -> int:
    """How many are on the disk at a time, the one being written included."""
    steps, checkpoint = config.train.steps, config.checkpoint
    if not checkpoint.keep:
        return math.ceil(steps / checkpoint.interval)
    besides = steps // math.lcm(checkpoint.interval, checkpoint.keep_every or steps + 1)
    return checkpoint.keep + besides + 1


def run_directory(config: Config) -> Iterator[Finding]:
    """Not in use, and where the run would go on from."""
    path = config.run_path
    if not path.is_dir():
        yield ok("run directory", f"{path}, new")
        return
    owner = holder(path)
    if owner is not None:
        found = f"{path} is locked by {owner}"
        yield fail("run directory", found, "stop that run, or choose another run_dir")
        return
    checkpoints = published(path / "checkpoints")
    steps = max((step_of(checkpoint) for checkpoint in checkpoints), default=None)
    newest = "no checkpoint" if steps is None else f"newest checkpoint after step {steps}"
    yield ok("run directory", f"{path}, {newest}")


def tracker(config: Config) -> Iterator[Finding]:
    """Whether there is a key for W&B; it is not called."""
    mode = config.tracking.mode
    if mode is TrackingMode.online and not has_wandb_key():
        fix = "wandb login, or set WANDB_API_KEY; the run would track offline"
        yield warn("tracker", "tracking.mode=online without a key", fix)
    else:
        yield ok("tracker", f"W&B {mode.value}; metrics.jsonl always")


def scheduler(config: Config) -> Iterator[Finding]:
    """Slurm's commands, and a time limit that leaves time to train."""
    if config.cluster.scheduler is Scheduler.local:
        return
    if shutil.which("sbatch") is None:
        yield warn("scheduler", "no sbatch on this machine", "submit from a login node")
    else:
        yield ok("scheduler", "sbatch is here")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
