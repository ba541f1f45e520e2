"""What an evaluation's row and the file of selections get from a probe."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hysparse_megatron.model.probe import Findings
from hysparse_megatron.tracking.architecture import ArchitectureWatch
from hysparse_megatron.tracking.selections import SELECTIONS_FILE, read_selections

FOUND = Findings({"oracle_mass/layer_004": 0.9}, [3, 70], [0, 64], {4: [[0], [0, 2]]}, 0.25)


class FakeProbe:
    """Finds what it is told, while somebody watches."""

    def __init__(self) -> None:
        self.found = FOUND
        self.watched = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self.watched = True
        yield
        self.watched = False

    def gather(self) -> Findings:
        assert not self.watched, "the evaluation is over"
        return self.found


def observe(watch: ArchitectureWatch, probe: FakeProbe, step: int) -> dict[str, Any]:
    with watch.observe(step) as observed:
        assert probe.watched
    return observed()


def test_row_and_file(tmp_path: Path) -> None:
    probe: Any = FakeProbe()
    watch = ArchitectureWatch(probe, 64, tmp_path, pytest.fail)
    row = observe(watch, probe, 10)
    assert row == {"oracle_mass/layer_004": 0.9, "architecture_seconds": 0.25}
    probe.found = replace(FOUND, selections={4: [[], [1]]})
    for step in (30, 10, 10, 20):  # of two starts
        observe(watch, probe, step)
    with (tmp_path / SELECTIONS_FILE).open("a") as file:
        file.write('{"step": 30, "lay')
    found = read_selections(tmp_path)
    assert sorted(found) == [10, 20]
    assert found[10]["layers"] == {4: [[], [1]]}
    assert found[20] == {
        "step": 20,
        "block_size": 64,
        "positions": [3, 70],
        "document_starts": [0, 64],
        "layers": {4: [[], [1]]},
    }


def test_only_one_rank_writes_and_only_if_there_is_something(tmp_path: Path) -> None:
    probe: Any = FakeProbe()
    observe(ArchitectureWatch(probe, 64, None, pytest.fail), probe, 1)
    probe.found = replace(FOUND, selections={})
    observe(ArchitectureWatch(probe, 64, tmp_path, pytest.fail), probe, 1)
    assert list(tmp_path.iterdir()) == []
    assert read_selections(tmp_path) == {}
