"""Fixtures of tests that are a whole run in one process. Imports torch where a test needs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from hysparse_megatron.training.state import TrainingState


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A default process group of this process alone."""
    from tests.unit.single_process import default_group

    with default_group():
        yield


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroupCollection]:
    """The same and megatron-core's groups."""
    from tests.unit.single_process import model_groups

    with model_groups() as made:
        yield made


@pytest.fixture
def states(group: None) -> Iterator[list[TrainingState]]:
    """Those that a test has built, which are to go before the default group does."""
    from hysparse_megatron.runtime.process_groups import destroy_process_groups

    yield []
    destroy_process_groups()
