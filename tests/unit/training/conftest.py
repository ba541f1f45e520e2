"""Fixtures of the training tests."""

from collections.abc import Iterator

import pytest

from tests.unit.single_process import default_group


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    with default_group():
        yield
