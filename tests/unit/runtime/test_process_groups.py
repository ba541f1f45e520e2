"""Process groups leave nothing behind."""

import os

from hysparse_megatron.config.schema import ParallelConfig
from hysparse_megatron.runtime.process_groups import build_process_groups, destroy_process_groups
from tests.unit.single_process import default_group


def test_layouts_one_after_the_other_add_no_threads() -> None:
    counts = []
    with default_group():
        for _ in range(3):
            groups = build_process_groups(ParallelConfig(), num_query_groups=1)
            at_work = len(os.listdir("/proc/self/task"))
            del groups
            destroy_process_groups()
            counts.append(len(os.listdir("/proc/self/task")))
    assert counts[-1] - counts[0] < (at_work - counts[0]) / 2
