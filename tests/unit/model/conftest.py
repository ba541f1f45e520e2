"""Fixtures of the model tests."""

from collections.abc import Iterator

import pytest
from megatron.core.process_groups_config import ProcessGroupCollection

from tests.unit.single_process import model_groups


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroupCollection]:
    with model_groups() as made:
        yield made
