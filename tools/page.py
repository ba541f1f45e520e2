"""One self-contained HTML page: no script, no network, readable in a light and a dark browser."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1a1a1a; --page: #fff; --rule: #ddd; --soft: #595959;
  --code: #f6f6f6; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e4e4; --page: #17191c; --rule: #3a3d42; --soft: #a8acb2; --code: #22252a; }}
}}
body {{ margin: 2rem auto; max-width: 78rem; padding: 0 1rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }}
h1 {{ margin-bottom: 0.2rem; }}
h2 {{ margin-top: 2.2rem; border-bottom: 1px solid var(--rule); }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.2rem 0.9rem 0.2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); overflow-wrap: anywhere; }}
td:first-child {{ white-space: nowrap; }}
.text td:last-child {{ white-space: pre-wrap; font-family: ui-monospace, monospace; }}
.wide {{ overflow-x: auto; }}
.charts {{ display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); }}
.charts img {{ width: 100%; height: auto; }}
.facts {{ display: flex; flex-wrap: wrap; gap: 0.6rem 2.2rem; margin: 1rem 0; }}
.facts div {{ font-size: 1.25rem; }}
.facts span {{ display: block; font-size: 0.8rem; color: var(--soft); }}
pre {{ background: var(--code); padding: 0.8rem; overflow-x: auto; }}
.note {{ color: var(--soft); }}
</style>
</head>
<body>
"""


class Page:
    """Collects the parts of a page, escaping what is text."""

    def __init__(self, title: str) -> None:
        self._parts = [_HEAD.format(title=html.escape(title)), f"<h1>{html.escape(title)}</h1>\n"]

    def heading(self, text: str) -> None:
        """Start a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>\n")

    def note(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f'<p class="note">{html.escape(text)}</p>\n')

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Large numbers, each under its name."""
        cells = "".join(
            f"<div><span>{html.escape(name)}</span>{html.escape(value)}</div>"
            for name, value in facts
        )
        self._parts.append(f'<div class="facts">{cells}</div>\n')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table; None is an empty cell."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        body = "".join(
            "<tr>"
            + "".join(f"<td>{'' if cell is None else html.escape(str(cell))}</td>" for cell in row)
            + "</tr>\n"
            for row in rows
        )
        head = f"<tr>{head}</tr>\n" if any(header) else ""
        self._parts.append(f'<div class="wide"><table>{head}{body}</table></div>\n')

    def text(self, text: str) -> None:
        """A text as it stands, line by line."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>\n")

    def texts(self, header: Sequence[str], rows: Sequence[tuple[object, str, str]]) -> None:
        """A table of what names a text, and the text in two parts, the first one in bold."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        body = "".join(
            f"<tr><td>{html.escape(str(name))}</td>"
            f"<td><b>{html.escape(prompt)}</b>{html.escape(text)}</td></tr>\n"
            for name, prompt, text in rows
        )
        self._parts.append(f'<div class="wide"><table class="text"><tr>{head}</tr>\n{body}')
        self._parts.append("</table></div>\n")

    def charts(self, images: Sequence[str]) -> None:
        """Images side by side, as `charts.py` makes them."""
        self._parts.append('<div class="charts">\n' + "\n".join(images) + "\n</div>\n")

    def fold(self, summary: str, text: str) -> None:
        """A long text that opens when it is asked for."""
        self._parts.append(
            f"<details><summary>{html.escape(summary)}</summary>"
            f"<pre>{html.escape(text)}</pre></details>\n"
        )

    def write(self, path: Path) -> None:
        """Write the whole page."""
        path.write_text("".join(self._parts) + "</body>\n</html>\n", encoding="utf-8")
