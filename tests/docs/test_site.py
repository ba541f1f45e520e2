"""The site: its pages, its links, the settings it lists, and what its reference names."""

import importlib
import inspect
import posixpath
import re

import hysparse_kernels
import pytest
import yaml

from docs import settings_reference
from docs.site_hooks import FILES, LINK, PAGES, site_path, source_of
from hysparse_megatron.config.describe import all_keys
from tests.docs.blocks import ROOT

DOCS = ROOT / "docs"
TEXTS = {source: (ROOT / source).read_text("utf-8") for source in PAGES} | {
    f"docs/{page.name}": page.read_text("utf-8") for page in DOCS.glob("*.md")
}
API = {name: TEXTS[f"docs/{name}.md"] for name in ("api_kernels", "api_model")}


def nav() -> list[str]:
    text = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    return re.findall(r": (\w+\.md)$", text, flags=re.M)


def anchors(text: str) -> set[str]:
    """Names of the headings, as Python-Markdown makes them."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading.replace("`", "")) for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading.strip().lower()) for heading in plain}


def test_every_page_is_in_the_navigation_and_there_once() -> None:
    pages = [page.name for page in DOCS.glob("*.md")] + [*PAGES.values(), "settings.md"]
    assert sorted(nav()) == sorted(pages)


@pytest.mark.parametrize("source", TEXTS)
def test_links_lead_to_what_there_is(source: str) -> None:
    for path, anchor in LINK.findall(TEXTS[source]):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if target != "docs/settings.md":
            assert (ROOT / target).is_file(), f"{source}: {target} is no file"
        if anchor:
            assert anchor[1:] in anchors(TEXTS[target]), f"{source}: {target} has no {anchor}"
        if site_path(target).endswith(".md") and not site_path(target).startswith(FILES):
            assert source_of(site_path(target)) == target


def test_the_site_asks_nothing_of_the_network() -> None:
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    plain = yaml.safe_load(config)
    assert plain["theme"]["font"] is False
    assert "://" not in config
    assert plain["validation"]["links"]["anchors"] == "warn"


def test_every_setting_is_listed_with_what_it_may_be() -> None:
    page = settings_reference.page()
    assert "| `[attention]` | What selective recomputes" in page
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| (.+?) \| (.+) \|$", page, flags=re.M)
    listed = {key: (allowed, default, text) for key, allowed, default, text in rows}
    assert set(all_keys()) <= set(listed)
    assert [key for key, (_, _, text) in listed.items() if len(text) < 10 and "." in key] == []
    assert listed["parallel.vpp"][:2] == ("an integer or null, at least 2", "`null`")
    assert listed["optim.name"][:2] == ("one of adamw, muon", "`adamw`")
    assert listed["model.layout"][2].endswith("W window, `|` a cut.")
    assert listed["train.steps"][1] == "*required*"
    assert listed["optim.muon.momentum"] == (
        "a number, at least 0 and below 1",
        "`0.95`",
        "Decay per step of the running mean of gradients, the only state of a matrix.",
    )


def named(text: str) -> list[str]:
    """The objects that a page of the reference shows."""
    found = []
    for name, options in re.findall(r"^::: ([\w.]+)\n((?:    .*\n)*)", text, flags=re.M):
        members = (yaml.safe_load(options) or {}).get("options", {}).get("members", [None])
        found += [name if member is None else f"{name}.{member}" for member in members]
    return found


@pytest.mark.parametrize("page", API)
def test_the_reference_shows_what_there_is_and_is_documented(page: str) -> None:
    names = named(API[page])
    assert len(names) > 12
    for name in names:
        module, _, last = name.rpartition(".")
        shown = getattr(importlib.import_module(module), last)
        if inspect.isclass(shown) or inspect.isfunction(shown):
            assert inspect.getdoc(shown), name


def test_the_reference_of_the_kernels_is_complete() -> None:
    shown = {name.rpartition(".")[2] for name in named(API["api_kernels"])}
    assert set(hysparse_kernels.__all__) - shown == {"ReduceScores"}  # a type of a parameter
