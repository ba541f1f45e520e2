"""Pages show pictures that are there, small, and light and dark."""

import re

import pytest

from tests.docs.blocks import PAGES
from tools.screenshots import SCHEMES, SIZES

SHOWN = [
    (page, found)
    for page in PAGES
    for found in re.findall(r'<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)">\n'
                            r'<img alt="[^"]+" src="([^"]+)">', page.read_text())
]  # fmt: skip


def test_every_picture_of_the_tool_is_shown() -> None:
    names = {path.rpartition("/")[2] for _, paths in SHOWN for path in paths}
    assert names == {f"{page}_{scheme}.png" for page in SIZES for scheme in SCHEMES}


@pytest.mark.parametrize(("page", "paths"), SHOWN, ids=str)
def test_pictures_are_small_and_of_one_size(page, paths: tuple[str, str]) -> None:
    image = pytest.importorskip("PIL.Image")
    dark, light = (image.open(page.parent / path).convert("L") for path in paths)
    assert dark.size == light.size
    assert dark.getpixel((2, 2)) < 60
    assert light.getpixel((2, 2)) > 240
    assert all((page.parent / path).stat().st_size < 150_000 for path in paths)
