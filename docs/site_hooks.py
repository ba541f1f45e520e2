"""What mkdocs does beside rendering docs/: pages from elsewhere, the settings, and their links."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "kernels/README.md": "kernels.md",
}
"""Pages that lie outside docs/, and what they are called on the site."""
FILES = "files/"
"""Where the site keeps files of the repository that a page links to."""
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_startup(command: str, dirty: bool) -> None:
    """Let `docs` be imported."""
    sys.path.insert(0, str(ROOT))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, those from elsewhere, and the files that pages link to."""
    from mkdocs.structure.files import File

    from docs import settings_reference

    texts = {name: (ROOT / source).read_text("utf-8") for source, name in PAGES.items()}
    texts["settings.md"] = settings_reference.page()
    for name, text in texts.items():
        files.append(File.generated(config, name, content=text))
    for page in list(files.documentation_pages()):
        for path in linked(source_of(page.src_uri), page.content_string):
            name = site_path(path)
            if name.startswith(FILES) and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links of the repository to where the site has what they name."""
    source = source_of(page.file.src_uri)

    def lead(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
        here = posixpath.dirname(page.file.src_uri)
        return f"]({posixpath.relpath(site_path(path), here or '.')}{found[2] or ''})"

    return LINK.sub(lead, markdown)


def linked(source: str, text: str) -> list[str]:
    """Paths in the repository of the files that the page `source` links to."""
    folder = posixpath.dirname(source)
    return [posixpath.normpath(posixpath.join(folder, path)) for path, _ in LINK.findall(text)]


def source_of(name: str) -> str:
    """Where the repository has the page that the site calls `name`."""
    return next((source for source, page in PAGES.items() if page == name), f"docs/{name}")


def site_path(path: str) -> str:
    """Where the site has a file of the repository: as a page, or as it is."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{FILES}{path}" if Path(path).suffix else f"{FILES}{path}.txt"
