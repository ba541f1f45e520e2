"""What one rank does in the tests of checkpoints; runs inside a worker, like `ranks.py`."""

import contextlib
import pickle
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor

from hysparse_megatron.checkpoint.moments import distributed_parts
from hysparse_megatron.checkpoint.saver import Saver
from hysparse_megatron.checkpoint.state import load_state, start_save
from hysparse_megatron.checkpoint.store import resolve
from hysparse_megatron.checkpoint.tensors import INDEX, read_weights
from hysparse_megatron.checkpoint.writer import CheckpointWrite, Job
from hysparse_megatron.config.schema import Config
from hysparse_megatron.data.read.batches import BatchSource
from hysparse_megatron.data.read.dataset import TokenSamples
from hysparse_megatron.data.read.order import Position
from hysparse_megatron.errors import CheckpointError
from hysparse_megatron.model.projection import GroupedProjection
from hysparse_megatron.training.muon import is_matrix, matrix_parts
from hysparse_megatron.training.state import TrainingState
from hysparse_megatron.training.step import Batch, evaluate, train_step
from tests.checkpoints import save, write_checkpoint
from tests.distributed.cases import VOCAB
from tests.distributed.ranks import Piece, Place, pieces, place_of, prepare, share_of


@dataclass(frozen=True)
class TokenFiles:
    """Global batches of `steps` steps, which the ranks read from files as a run does."""

    prefix: str
    steps: int

    def __len__(self) -> int:
        return self.steps


Batches = Sequence[np.ndarray] | TokenFiles
"""By step: [sequences, S + 1]."""


def _reader(state: TrainingState, batches: Batches) -> Callable[[int], list[Batch]]:
    """This rank's share of a step."""
    if not isinstance(batches, TokenFiles):
        return lambda step: share_of(state, torch.from_numpy(batches[step]))
    train = state.config.train
    source = BatchSource(
        TokenSamples(batches.prefix, train.seq_length, VOCAB),
        seed=train.seed,
        fingerprint="of the test",
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        data_parallel_size=state.groups.dp.size(),
        data_parallel_rank=state.groups.dp.rank(),
    )
    return lambda step: list(source.microbatches(Position(step * train.global_batch_size)))


def _trained(
    config: Config, batches: Batches, steps: int
) -> tuple[TrainingState, Callable[[int], list[Batch]]]:
    """A state after `steps`, and its reader."""
    state = prepare(config)
    read = _reader(state, batches)
    for step in range(steps):
        train_step(state, step, read(step))
    return state, read


@dataclass
class Continuation:
    """What a rank has and does from a checkpoint on."""

    place: Place
    first_step: int
    eval_loss: float
    losses: list[float]
    grad_norms: list[float]
    learning_rates: list[float]
    read: list[np.ndarray]
    """By step: this rank's tokens."""
    streams: list[dict[str, np.ndarray]]
    """By step: the states of all random streams after it."""
    first: dict[str, Piece]
    """Parameters before the first step."""
    parameters: dict[str, Piece]
    """After the last step."""
    buffers: list[np.ndarray]
    """What else the model keeps, such as the experts' biases, after the last step."""
    optimizer: list[np.ndarray]
    """This rank's main parameters, moments and step counts, after the last step."""


def train_and_save(
    rank: int, config: Config, tokens: Batches, run_dir: Path, save_after: int
) -> Continuation:
    """Train on `tokens`, saving after `save_after` of them; reports what comes after the save."""
    state, read = _trained(config, tokens, save_after)
    save(state, run_dir, save_after)
    return _continue(state, read, save_after, len(tokens))


def imported_late(rank: int, job: Callable[..., Any], **arguments: Any) -> list[str]:
    """Modules that a job was the first to import."""
    known = set(sys.modules)
    job(rank, **arguments)
    return sorted(sys.modules.keys() - known)


def save_initial(rank: int, config: Config, run_dir: Path) -> None:
    """Save a model that was not trained: its weights follow from the seed alone."""
    save(prepare(config), run_dir, 1)


def train_while_saving(
    rank: int, config: Config, tokens: Batches, run_dir: Path, save_after: int
) -> Continuation:
    """`train_and_save`, whose files are written only after the last step."""
    state, read = _trained(config, tokens, save_after)
    trained = threading.Event()

    def start(path: Path) -> Job:
        job = start_save(state, save_after, path)
        return Job(lambda: trained.wait() and job.write(), job.finish)

    # The second save reuses the memory of the first.
    save(state, run_dir / "other", 1)
    write = CheckpointWrite(run_dir / "checkpoints", save_after, start, {}, in_background=True)
    went_on = _continue(state, read, save_after, len(tokens))
    assert not write.is_written(state.device)
    trained.set()
    write.finish()
    return went_on


def load_and_train(
    rank: int,
    config: Config,
    tokens: Batches,
    run_dir: Path,
    save_to: Path | None = None,
    in_slices: bool = False,
) -> Continuation:
    """Load the run's newest checkpoint, save it again if asked, train on the rest of `tokens`."""
    state = prepare(config)
    step = load_state(state, resolve(run_dir))
    if save_to is not None:
        with _plain_slices() if in_slices else contextlib.nullcontext():
            save(state, save_to, step)
    return _continue(state, _reader(state, tokens), step, len(tokens))


@contextlib.contextmanager
def _plain_slices() -> Iterator[None]:
    """Each rank writes the rows of input projections from rank / T of all rows on, as all did when
    ranks that share a KV group held such rows of it (of one KV group)."""

    def in_slices(module: GroupedProjection, slices: ShardedTensor) -> ShardedTensorFactory:
        group = module.sharing_group

        def build(key: str, tensor: Tensor, replica_id: object, flattened_range: None):
            of_ranks = [torch.empty_like(tensor) for _ in range(group.size())]
            dist.all_gather(of_ranks, tensor.contiguous(), group=group)
            parts = zip(*(rows.split(module.widths()) for rows in of_ranks), strict=True)
            whole = torch.cat([share for part in parts for share in part])
            own = whole.chunk(group.size())[group.rank()].contiguous()
            return replace(slices, key=key, data=own, dtype=own.dtype, replica_id=replica_id)

        return ShardedTensorFactory(
            slices.key, slices.data, build, lambda loaded: loaded, slices.replica_id
        )

    with mock.patch.object(GroupedProjection, "_in_parts", in_slices):
        yield


def _continue(
    state: TrainingState, read: Callable[[int], list[Batch]], first_step: int, steps: int
) -> Continuation:
    # A batch that is trained on next is known to be free of near-ties with these weights.
    held_out = evaluate(state, [read(min(first_step, steps - 1))])
    assert held_out is not None
    results, tokens, streams = [], [], []
    first = pieces(state, lambda parameter: parameter)
    for step in range(first_step, steps):
        share = read(step)
        results.append(train_step(state, step, share))
        tokens.append(np.concatenate([batch["tokens"].numpy() for batch in share]))
        streams.append(_streams())
    state.settle()
    buffers = [buffer for chunk in state.chunks for buffer in chunk.module.buffers()]
    return Continuation(
        place_of(state),
        first_step,
        held_out.loss,
        [result.loss for result in results],
        [result.grad_norm for result in results],
        [result.learning_rate for result in results],
        tokens,
        streams,
        first,
        pieces(state, lambda parameter: parameter),
        [buffer.float().numpy().copy() for buffer in buffers],
        _optimizer_tensors(state),
    )


def _streams() -> dict[str, np.ndarray]:
    states = {
        **megatron_random.get_cuda_rng_tracker().get_states(),
        "default": torch.get_rng_state(),
    }
    return {name: stream.numpy().copy() for name, stream in states.items()}


def _optimizer_tensors(state: TrainingState) -> list[np.ndarray]:
    found = []
    adam = ("exp_avg", "exp_avg_sq", "step")
    parts = [(part, adam) for part in distributed_parts(state.optimizer)]
    parts += [(part, ("momentum_buffer",)) for part in matrix_parts(state.optimizer)]
    for part, names in parts:
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                kept = part.optimizer.state[main]
                tensors = (main, *(kept[name] for name in names))
                found += [tensor.detach().float().numpy().copy() for tensor in tensors]
    return found


def load_error(rank: int, config: Config, run_dir: Path) -> str:
    """The message with which the run's checkpoint is refused by the model of `config`."""
    state = prepare(config)
    try:
        load_state(state, resolve(run_dir))
    except CheckpointError as error:
        return str(error)
    return "loaded"


def load_weights(rank: int, config: Config, run_dir: Path) -> dict[str, Piece]:
    """This rank's weights after a load without optimizer state; of matrices, Muon's fp32 copies."""
    state = prepare(config)
    load_state(state, resolve(run_dir), weights_only=True)
    return pieces(state, lambda p: getattr(p, "main_param", p) if is_matrix(p) else p)


def write_files(rank: int, checkpoints: Path, steps: Sequence[int]) -> None:
    """Checkpoints of one small file per rank."""
    for step in steps:
        write_checkpoint(checkpoints, step, lambda path: _write_file(path, rank), {"fact": 7})


def write_and_fail(rank: int, checkpoints: Path, step: int) -> str:
    """A checkpoint whose second rank runs out of space; returns the error that this rank gets."""

    def write(path: Path) -> None:
        _write_file(path, rank)
        if rank == 1:
            raise OSError(28, "No space left on device")

    try:
        write_checkpoint(checkpoints, step, write, {})
    except CheckpointError as error:
        return str(error)
    return "written"


def save_beyond_limit(rank: int, config: Config, run_dir: Path) -> str:
    """Save, then save again with a second rank that may write no more than a few bytes.

    Returns the error that this rank gets.
    """
    state = prepare(config)
    save(state, run_dir, 1)

    def start(path: Path) -> Job:
        job = start_save(state, 2, path)

        def write() -> None:
            with small_files() if rank == 1 else contextlib.nullcontext():
                job.write()

        return Job(write, job.finish)

    try:
        CheckpointWrite(run_dir / "checkpoints", 2, start, {}).finish()
    except CheckpointError as error:
        return str(error)
    return "written"


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """As on a full disk: this process may write no more than 100 bytes into a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fail_in_background(rank: int, config: Config, run_dir: Path) -> tuple[str, bool]:
    """Save, then save beside training on a second rank that may write no more than a few bytes.

    Returns the error that this rank gets from a poll, and whether the save returned before.
    """
    state = prepare(config)
    saver = Saver(state, run_dir / "checkpoints", lambda step, progress: {}, lambda text: None)
    saver.save(1, {})
    saver.finish()
    with small_files() if rank == 1 else contextlib.nullcontext():
        try:
            saver.save(2, {})
            returned = saver.is_busy
            while saver.is_busy:
                saver.poll()
                time.sleep(0.05)
        except CheckpointError as error:
            return str(error), returned
    return "written", returned


def weights_without_pickle(rank: int, run_dir: Path) -> dict[str, np.ndarray]:
    """The newest checkpoint's weights, read while unpickling is out of order."""
    directory = resolve(run_dir)

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("unpickled")

    with (
        mock.patch.object(pickle, "load", refuse),
        mock.patch.object(pickle, "loads", refuse),
        mock.patch.object(pickle, "Unpickler", refuse),
        mock.patch.object(torch, "load", refuse),
    ):
        return {name: tensor.float().numpy() for name, tensor in read_weights(directory).items()}


def _write_file(path: Path, rank: int) -> None:
    (path / f"__{rank}_0.distcp").write_bytes(bytes(100 + rank))
    if rank == 0:
        (path / INDEX).write_text("{}")
