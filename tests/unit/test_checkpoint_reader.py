"""Checkpoints of strangers: nothing in them is run, and what is plain is read to the bit."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hysparse_megatron.checkpoint.early import METADATA, read_early_index
from hysparse_megatron.checkpoint.state import load_state
from hysparse_megatron.checkpoint.tensors import INDEX, read_tensor, read_weights, read_whole_index
from hysparse_megatron.config.compose import compose
from hysparse_megatron.errors import CheckpointError
from hysparse_megatron.runtime.process_groups import destroy_process_groups
from hysparse_megatron.training.state import TrainingState, build_state
from hysparse_megatron.training.step import train_step
from tests.checkpoints import save
from tests.unit.single_process import DEVICE, default_group
from tests.unit.training.tiny_states import SETTINGS, VOCABULARY, random_batches

COMMON, WEIGHT = "common_state/shard_0_1", "decoder.final_norm.weight"


@pytest.fixture(scope="module", params=["adamw", "muon"])
def state(request: pytest.FixtureRequest, session_seed: int) -> Iterator[TrainingState]:
    torch.manual_seed(session_seed)
    with default_group():
        config = compose([*SETTINGS, f"optim.name={request.param}", "train.precision=bf16"])
        built = build_state(config, VOCABULARY, DEVICE)
        for step in range(3):
            train_step(built, step, random_batches())
        yield built
        destroy_process_groups()


@pytest.fixture(scope="module")
def original(state: TrainingState, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(state, tmp_path_factory.mktemp("run"), 3)


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return shutil.copytree(original, tmp_path / "run" / "checkpoints" / original.name)


class Payload:
    """Makes a directory where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def archived(content: Any) -> bytes:
    """As torch.save writes it."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def index_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / INDEX).read_text())


def make_early(checkpoint: Path) -> None:
    """As versions wrote it whose index did not say where objects lie."""
    index = index_of(checkpoint)
    (checkpoint / INDEX).write_text(json.dumps({**index, "objects": sorted(index["objects"])}))


def put(checkpoint: Path, name: str, content: bytes) -> None:
    """Let the index say that an object, or a tensor's only chunk, is `content`."""
    index = index_of(checkpoint)
    place = index["objects"][name] if name == COMMON else index["tensors"][name]["chunks"][0]
    shard = checkpoint / place["file"]
    place |= {"start": shard.stat().st_size, "bytes": len(content)}
    shard.write_bytes(shard.read_bytes() + content)
    (checkpoint / INDEX).write_text(json.dumps(index))


def objects(checkpoint: Path) -> dict[str, Any]:
    found = {}
    for name, place in read_whole_index(checkpoint)["objects"].items():
        with (checkpoint / place["file"]).open("rb") as file:
            file.seek(place["start"])
            content = io.BytesIO(file.read(place["bytes"]))
        found[name] = torch.load(content, weights_only=True)
    return found


def spoil(state: TrainingState) -> None:
    """Let nothing of what was trained be left."""
    for chunk in state.chunks:
        for parameter in chunk.parameters():
            parameter.detach().zero_()
    for part in state.optimizer.chained_optimizers:
        for kept in part.optimizer.state.values():
            for value in kept.values():
                value.zero_()


def without_index(checkpoint: Path) -> None:
    (checkpoint / INDEX).unlink()


def unchanged(checkpoint: Path) -> None:
    del checkpoint


@pytest.mark.parametrize("version", [unchanged, make_early, without_index])
def test_everything_is_read_to_the_bit(
    version: Callable[[Path], None],
    state: TrainingState,
    original: Path,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    version(checkpoint)
    spoil(state)
    assert load_state(state, checkpoint) == 3
    again = save(state, tmp_path / "again", 3)
    assert objects(again) == objects(original)
    before, after = index_of(original)["tensors"], index_of(again)["tensors"]
    assert before.keys() == after.keys()
    for name, entry in before.items():
        pair = read_tensor(original, entry), read_tensor(again, after[name])
        assert pair[0].dtype == pair[1].dtype
        assert torch.equal(*pair), name


def test_the_early_description_is_the_index(original: Path) -> None:
    early, index = read_early_index(original), index_of(original)
    assert early["objects"] == index["objects"]
    assert early["tensors"] == index["tensors"]


def test_no_pickle_is_needed(
    state: TrainingState, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("unpickled")

    (checkpoint / METADATA).unlink()
    load = torch.load
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(
        torch,
        "load",
        # Without restrictions is read only what was made of plain values before, in memory.
        lambda file, **how: (
            load(file, **how) if how.get("weights_only") or type(file) is io.BytesIO else refuse()
        ),
    )
    load_state(state, checkpoint)
    load_state(state, checkpoint, weights_only=True)


def evil_metadata(checkpoint: Path, payload: Payload) -> None:
    make_early(checkpoint)
    (checkpoint / METADATA).write_bytes(pickle.dumps(payload))


def evil_metadata_without_index(checkpoint: Path, payload: Payload) -> None:
    without_index(checkpoint)
    (checkpoint / METADATA).write_bytes(pickle.dumps({"state_dict_metadata": payload}))


def evil_common_file(checkpoint: Path, payload: Payload) -> None:
    (checkpoint / "common.pt").write_bytes(archived({"step": payload}))


def evil_object(checkpoint: Path, payload: Payload) -> None:
    put(checkpoint, COMMON, archived([{"step": 3, "optimizer": payload}]))


def evil_raw_object(checkpoint: Path, payload: Payload) -> None:
    put(checkpoint, COMMON, pickle.dumps(payload))


def evil_tensor(checkpoint: Path, payload: Payload) -> None:
    put(checkpoint, WEIGHT, archived([torch.ones(24), payload]))


EVIL = [
    evil_metadata,
    evil_metadata_without_index,
    evil_common_file,
    evil_object,
    evil_raw_object,
    evil_tensor,
]


@pytest.mark.parametrize("weights_only", [False, True], ids=["resume", "load"])
@pytest.mark.parametrize("evil", EVIL)
def test_nothing_in_a_checkpoint_is_run(
    evil: Callable[[Path, Payload], None],
    weights_only: bool,
    state: TrainingState,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    """Resume; `checkpoint.load`, generate and evaluate; export and the commands that look."""
    proof = tmp_path / "proof"
    evil(checkpoint, Payload(proof))
    with pytest.raises(CheckpointError, match=str(checkpoint)) as caught:
        load_state(state, checkpoint, weights_only)
    assert "Traceback" not in str(caught.value)
    if evil in (evil_metadata_without_index, evil_tensor):
        with pytest.raises(CheckpointError, match=str(checkpoint)):
            read_weights(checkpoint)
    else:
        assert WEIGHT in read_weights(checkpoint)
    assert not proof.exists()


def test_the_payload_would_have_been_run(tmp_path: Path) -> None:
    """By torch's own readers: otherwise the test before proves nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "raw")))
    torch.load(io.BytesIO(archived(Payload(tmp_path / "archived"))), weights_only=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archived", "raw"]


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a file above": lambda chunk: chunk.update(file="../../elsewhere"),
    "an absolute path": lambda chunk: chunk.update(file="/etc/passwd"),
    "another file": lambda chunk: chunk.update(file="__7_0.distcp"),
    "beyond the file": lambda chunk: chunk.update(start=10**12),
    "a length beyond memory": lambda chunk: chunk.update(bytes=10**18),
    "a negative start": lambda chunk: chunk.update(start=-1),
    "offsets outside": lambda chunk: chunk.update(offsets=[5]),
    "sizes of another rank": lambda chunk: chunk.update(sizes=[4, 6]),
    "sizes that are text": lambda chunk: chunk.update(sizes=["24"]),
    "no sizes": lambda chunk: chunk.pop("sizes"),
    "part of the values": lambda chunk: chunk.update(sizes=[12]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_index_is_checked_before_it_is_believed(checkpoint: Path, damage: str) -> None:
    (checkpoint.parent / "elsewhere").write_bytes(b"x" * 10_000)
    index = index_of(checkpoint)
    DAMAGE[damage](index["tensors"][WEIGHT]["chunks"][0])
    (checkpoint / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"{checkpoint / INDEX} is damaged"):
        read_weights(checkpoint)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"tensors": 3, "objects": {}}', "[" * 100_000, "null"]
)
def test_an_index_that_is_none(content: str, checkpoint: Path, state: TrainingState) -> None:
    (checkpoint / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_weights(checkpoint)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_state(state, checkpoint)


@pytest.mark.parametrize("found", [[], [3], [{}], [{"step": 3}], [{"step": 3, "optimizer": {}}]])
def test_plain_values_that_are_no_optimizer(
    found: Any, checkpoint: Path, state: TrainingState
) -> None:
    put(checkpoint, COMMON, archived(found))
    with pytest.raises(CheckpointError, match=str(checkpoint)):
        load_state(state, checkpoint)
