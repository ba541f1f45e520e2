"""docs/launching.md names what exists, and its commands compose."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.describe import type_of
from hysparse_megatron.config.frozen import build, to_yaml

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"`([^`\n]+)`", TEXT)


def test_named_files_exist() -> None:
    named = [name for name in QUOTED if re.fullmatch(r"[\w/]+\.(py|yaml|j2|sh)", name)]
    assert len(named) > 4
    for name in named:
        assert (ROOT / name).exists() or name == "conf/local/local.yaml", name


def test_named_settings_exist() -> None:
    for name in QUOTED:
        if re.fullmatch(r"(cluster|train|optim)\.[\w.]+(=\w+)?", name):
            assert type_of(name.partition("=")[0]) is not None, name


def test_the_example_of_a_cluster_is_a_configuration() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    given = yaml.safe_load(block)["cluster"]["slurm"]
    tree = yaml.safe_load(to_yaml(compose(["cluster=slurm"])))
    tree["cluster"]["slurm"] |= given
    assert build(tree).cluster.slurm.time_limit == "48:00:00"


@pytest.mark.parametrize(
    "line",
    [
        line.strip()
        for line in TEXT.replace("\\\n", " ").splitlines()
        if line.startswith("    ")
        and not line.strip().startswith(
            ("time_limit", "options", "setup", "docker", "enroot", "apptainer")
        )
    ],
)
def test_commands_have_real_overrides(line: str) -> None:
    words = [word for word in shlex.split(line) if re.match(r"[a-z_.]+=", word)]
    assert words
    compose(words)


def test_measured_rows_are_those_of_the_logs() -> None:
    folder = ROOT / "tools" / "step_benchmark" / "results"
    for name in ("overlap_7b_8k", "overlap_7b_8k_sockets"):
        log = json.loads((folder / f"2026-11-30-h200x2-{name}.json").read_text())
        found = {row["split"]: f"{1e3 * row['median_seconds']:.1f} ms" for row in log["rows"]}
        apart = found.get("dp2-apart", "not measured")
        assert f" | {found['1']} | {found['dp2']} | {apart} |" in TEXT, name


def test_prompts_take_what_the_log_says() -> None:
    folder = ROOT / "kernels" / "benchmarks" / "results"
    log = json.loads((folder / "2026-12-01-h200-ranges_prefill.json").read_text())
    page = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    rows = [row for row in log["rows"] if row["table"] == "prefill"]
    assert len(rows) == 5
    for row in rows:
        assert f" {row['median_ms']:.0f} ms |" in page, row["label"]
