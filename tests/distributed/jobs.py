"""What one rank does in the tests beside parity; runs inside a worker, like `ranks.py`.

Shapes: S sequence, B micro-batch, M micro-batches.
"""

from __future__ import annotations

import contextlib
import pickle
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor

from hysparse_megatron.checkpoint.saver import Saver
from hysparse_megatron.checkpoint.state import load_state, start_save
from hysparse_megatron.checkpoint.store import resolve_checkpoint
from hysparse_megatron.checkpoint.tensors import read_weights
from hysparse_megatron.checkpoint.writer import CheckpointWrite, Job
from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import CheckpointError
from hysparse_megatron.model import attention
from hysparse_megatron.model.layer import HySparseLayer
from hysparse_megatron.runtime import megatron_on_cpu
from hysparse_megatron.training.muon import is_matrix, matrix_parts
from hysparse_megatron.training.optimizer import distributed_parts
from hysparse_megatron.training.state import TrainingState
from hysparse_megatron.training.step import evaluate, train_step
from tests.checkpoints import save, write_checkpoint
from tests.distributed.ranks import (
    Piece,
    Place,
    SelectionRecorder,
    pieces,
    place_of,
    prepare,
    share_of,
)

# Replicated parameters ---------------------------------------------------------------------------

FORGOTTEN = "decoder.layers.1.input_layernorm.weight"
"""The norm weight that `forget_sequence_parallel` spoils."""


def forget_sequence_parallel(state: TrainingState) -> None:
    """Make the mistake that lets tensor-parallel ranks drift apart, for one norm."""
    [chunk] = state.chunks
    del chunk.module.decoder.layers[1].input_layernorm.weight.sequence_parallel


# Causality ---------------------------------------------------------------------------------------


@dataclass
class TokenLosses:
    """What a rank computes for one batch."""

    place: Place
    losses: np.ndarray | None
    """[M, B, S] on the last stage."""
    selections: dict[int, np.ndarray]
    """By oracle layer of this rank: block indices [M, B, HKV, S, K]."""


def token_losses(
    rank: int,
    config: Config,
    batches: Sequence[np.ndarray],
    labels: np.ndarray,
    leak: bool = False,
) -> list[TokenLosses]:
    """Losses per token of every batch of tokens [sequences, S + 1], with the same labels for all.

    `leak` lets every query see a little of what the next one sees.
    """
    state = prepare(config)
    kept: list[np.ndarray] = []
    last = state.chunks[-1].module
    if last.post_process:
        last.register_forward_hook(lambda _module, _inputs, out: kept.append(out.numpy().copy()))
    results = []
    for batch in batches:
        recorder = SelectionRecorder()
        with recorder.watch(), _leaking() if leak else contextlib.nullcontext():
            shares = share_of(state, torch.from_numpy(batch), torch.from_numpy(labels))
            evaluate(state, [shares])
        losses = np.stack(kept) if kept else None
        kept.clear()
        results.append(TokenLosses(place_of(state), losses, recorder.take()))
    return results


@contextlib.contextmanager
def _leaking() -> Iterator[None]:
    honest = attention.block_sparse_attention

    def leaky(*arguments: Any, **options: Any) -> Tensor:
        output = honest(*arguments, **options)
        return output + 0.1 * output.roll(-1, dims=1)

    with mock.patch.object(attention, "block_sparse_attention", leaky):
        yield


# Checkpoints -------------------------------------------------------------------------------------


@dataclass
class Continuation:
    """What a rank has and does from a checkpoint on."""

    place: Place
    first_step: int
    eval_loss: float
    losses: list[float]
    grad_norms: list[float]
    parameters: dict[str, Piece]
    """After the last step."""
    optimizer: list[np.ndarray]
    """This rank's main parameters, moments and step counts, after the last step."""


def train_and_save(
    rank: int, config: Config, tokens: Sequence[np.ndarray], run_dir: Path, save_after: int
) -> Continuation:
    """Train on `tokens`, saving after `save_after` of them; reports what comes after the save."""
    state = prepare(config)
    for step in range(save_after):
        train_step(state, step, share_of(state, torch.from_numpy(tokens[step])))
    save(state, run_dir, save_after)
    return _continue(state, tokens, save_after)


def train_while_saving(
    rank: int, config: Config, tokens: Sequence[np.ndarray], run_dir: Path, save_after: int
) -> Continuation:
    """`train_and_save`, whose files are written only after the last step."""
    state = prepare(config)
    for step in range(save_after):
        train_step(state, step, share_of(state, torch.from_numpy(tokens[step])))
    trained = threading.Event()

    def start(path: Path) -> Job:
        job = start_save(state, save_after, path)
        return Job(lambda: trained.wait() and job.write(), job.finish)

    # The second save reuses the memory of the first.
    save(state, run_dir / "other", 1)
    write = CheckpointWrite(run_dir / "checkpoints", save_after, start, {}, in_background=True)
    went_on = _continue(state, tokens, save_after)
    assert not write.is_written(state.device)
    trained.set()
    write.finish()
    return went_on


def load_and_train(
    rank: int,
    config: Config,
    tokens: Sequence[np.ndarray],
    run_dir: Path,
    save_to: Path | None = None,
) -> Continuation:
    """Load the run's newest checkpoint, save it again if asked, train on the rest of `tokens`."""
    state = prepare(config)
    step = load_state(state, resolve_checkpoint(run_dir))
    if save_to is not None:
        save(state, save_to, step)
    return _continue(state, tokens, step)


def _continue(state: TrainingState, tokens: Sequence[np.ndarray], first_step: int) -> Continuation:
    # A batch that is trained on next is known to be free of near-ties with these weights.
    held_out = tokens[min(first_step, len(tokens) - 1)]
    eval_loss = evaluate(state, [share_of(state, torch.from_numpy(held_out))])
    results = [
        train_step(state, step, share_of(state, torch.from_numpy(tokens[step])))
        for step in range(first_step, len(tokens))
    ]
    return Continuation(
        place_of(state),
        first_step,
        eval_loss,
        [result.loss for result in results],
        [result.grad_norm for result in results],
        pieces(state, lambda parameter: parameter),
        _optimizer_tensors(state),
    )


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
        load_state(state, resolve_checkpoint(run_dir))
    except CheckpointError as error:
        return str(error)
    return "loaded"


def load_weights(rank: int, config: Config, run_dir: Path) -> dict[str, Piece]:
    """This rank's weights after a load without optimizer state; of matrices, Muon's fp32 copies."""
    state = prepare(config)
    load_state(state, resolve_checkpoint(run_dir), weights_only=True)
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
    directory = resolve_checkpoint(run_dir)

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


# Random streams ----------------------------------------------------------------------------------


@dataclass
class DropoutRun:
    """What a rank dropped, and its residual stream, call by call, in one step."""

    place: Place
    dropped: list[np.ndarray]
    residual: list[np.ndarray]


def dropout_in_steps(
    rank: int, config: Config, tokens: np.ndarray, steps: Sequence[int]
) -> list[DropoutRun]:
    """Make the steps with the given numbers, one after another and all on one batch."""
    state = prepare(config)
    return [_dropout_in_step(state, tokens, step) for step in steps]


def _dropout_in_step(state: TrainingState, tokens: np.ndarray, step: int) -> DropoutRun:
    run = DropoutRun(place_of(state), [], [])
    dropout: Callable[..., Tensor] = torch.nn.functional.dropout

    depth = 0

    def recorded(*arguments: Any, **options: Any) -> Tensor:
        # Under a torch function mode, as on a machine without CUDA, dropout calls itself once.
        nonlocal depth
        depth += 1
        output = dropout(*arguments, **options)
        depth -= 1
        if depth == 0:
            run.dropped.append((output == 0).numpy().copy())
        return output

    def keep_residual(_module: Any, _inputs: Any, output: Any) -> None:
        run.residual.append(output[0].detach().numpy().copy())

    hooks = [
        module.register_forward_hook(keep_residual)
        for chunk in state.chunks
        for module in chunk.modules()
        if isinstance(module, HySparseLayer)
    ]
    with mock.patch.object(torch.nn.functional, "dropout", recorded):
        train_step(state, step, share_of(state, torch.from_numpy(tokens)))
    for hook in hooks:
        hook.remove()
    return run


def initial_weights(rank: int, config: Config) -> tuple[Place, dict[str, Piece]]:
    """The rank's weights before the first step."""
    state = prepare(config)
    return place_of(state), pieces(state, lambda parameter: parameter)


def installed_twice(rank: int) -> tuple[bool, list[int], list[int]]:
    """Whether a second `install()` says it is active, and what was installed before and after."""
    megatron_on_cpu.install()
    before = _installed()
    return megatron_on_cpu.install(), before, _installed()


def _installed() -> list[int]:
    return [
        len(torch.overrides._get_current_function_mode_stack()),
        id(megatron_random.get_cuda_rng_tracker()),
        id(torch.cuda.current_device),
        id(torch.cuda.current_stream),
    ]
