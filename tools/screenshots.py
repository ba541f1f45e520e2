"""Pictures of report, comparison and plan for the pages: `python -m tools.screenshots RUN OTHER`.

    make train
    make train ARGS="name=full model.layout='5*F | 4*F'"
    .venv/bin/python -m tools.screenshots runs/quickstart runs/full

Draws the report of RUN, its comparison with OTHER and the plan of the paper's 80B model, and takes
pictures of them in Chromium, as a light and as a dark reader sees them, to docs/pictures. Needs the
extra `report` and the package chromium.

Ends with 0, or with 2 if a path is no run or a program is missing.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hysparse_megatron.command import command, make_parser
from hysparse_megatron.config.compose import compose
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.plan.picture import draw
from hysparse_megatron.plan.suggest import overview_of

from . import compare_runs
from .report import write_report
from .run_data import load_run

PLAN = (["experiment=paper_80b_a3b_32k", "cluster=h100"], 128)
"""What is planned, and on how many GPUs."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SCHEMES = {"light": 1, "dark": 0}
"""What a reader prefers, as Chromium numbers it."""
SIZES = {"report": (1240, 1800), "comparison": (1240, 1100), "plan": (1000, 560)}
"""Pixels of the window, which cuts a page off at its end."""
COLOURS = 256
"""Of a picture, so that it is small."""


@command
def main(argv: Sequence[str]) -> int:
    """Do what `argv` says, the command line without the program's name."""
    parser = make_parser("python -m tools.screenshots", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("other", type=Path, metavar="OTHER", help="run to compare it with")
    parser.add_argument("--output", type=Path, metavar="FOLDER", default=Path("docs/pictures"))
    args = parser.parse_args(list(argv))
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise ConfigError(f"none of {', '.join(BROWSERS)} is installed: apt-get install chromium")
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for page in _pages(args.run, args.other, Path(folder)):
            for scheme in SCHEMES:
                path = args.output / f"{page.stem}_{scheme}.png"
                path.write_bytes(take(browser, page, scheme))
                print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


def _pages(run: Path, other: Path, folder: Path) -> list[Path]:
    """What pictures are taken of, drawn in `folder`."""
    report, comparison, plan = (
        folder / name for name in ("report.html", "comparison.html", "plan.svg")
    )
    found = load_run(run)
    write_report(found, report)
    if compare_runs.main([str(other), str(run), "--output", str(comparison)]) == 2:
        raise ConfigError(f"{run} and {other} cannot be compared")
    settings, num_gpus = PLAN
    plan.write_text(draw(overview_of(compose(settings), num_gpus)))
    return [report, comparison, plan]


def take(browser: str, page: Path, scheme: str) -> bytes:
    """A PNG of the upper part of a page, as a reader with this scheme sees it."""
    from PIL import Image

    width, height = SIZES[page.stem]
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                f"--user-data-dir={folder}/profile",
                f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
                f"--window-size={width},{height}",
                "--virtual-time-budget=5000",
                f"--screenshot={picture}",
                page.absolute().as_uri(),
            ],
            capture_output=True,
            check=True,
            timeout=120,
        )
        image = Image.open(picture).convert("RGB")
    small = io.BytesIO()
    image.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        small, "png", optimize=True
    )
    return small.getvalue()


if __name__ == "__main__":
    sys.exit(main())
