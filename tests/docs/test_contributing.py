"""CONTRIBUTING.md, CITATION.cff and the hosted CI name what there is."""

import re
from pathlib import Path

import yaml

import hysparse_megatron

ROOT = Path(__file__).resolve().parents[2]


def test_files_and_targets_that_are_named_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    names = re.findall(r"`((?:hysparse_megatron|kernels|tests|\.ci)[\w/.]*)`", text)
    names += re.findall(r"\]\(([^)]+)\)", text)
    assert len(names) > 12
    assert [name for name in names if not (ROOT / name).exists()] == []
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_the_hosted_jobs_are_the_parts_of_ci() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    parts = jobs["test"]["strategy"]["matrix"]["part"]
    run = (ROOT / ".ci/run").read_text()
    assert parts == re.findall(r"^make ([a-z-]+)", run, flags=re.M)
    train = next(line for line in run.splitlines() if line.startswith("make train"))
    assert jobs["test"]["steps"][-1]["run"] == train


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == hysparse_megatron.__version__
    assert citation["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    for name in ("bug", "proposal"):
        assert yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())["body"]
