"""Fixtures of the tests of generation."""

from collections.abc import Iterator

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from tests.unit.single_process import model_groups


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroupCollection]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with model_groups() as made:
        yield made
    torch.set_num_threads(before)
