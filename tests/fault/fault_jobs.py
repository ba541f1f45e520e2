"""What one rank does in the tests of bad steps; runs inside a worker of `tests/distributed`."""

from dataclasses import dataclass

import torch

from hysparse_megatron.config.schema import Config
from hysparse_megatron.runtime import faults
from hysparse_megatron.training.state import TrainingState
from hysparse_megatron.training.step import StepResult, finite_everywhere, train_step
from tests.distributed.cases import random_tokens
from tests.distributed.ranks import prepare, share_of


@dataclass
class BadStep:
    """A good step, a bad one and a good one."""

    results: list[StepResult]
    changed: list[list[str]]
    """By step: which tensors it changed, parameters and the optimizer's state."""


def one_bad_step(rank: int, config: Config, fault: str, seed: int) -> BadStep:
    """Three steps with `fault` armed, as the variable would."""
    faults._armed[:] = [found for found in faults.parse(fault) if found.rank == rank]
    state = prepare(config)
    done = BadStep([], [])
    before = _tensors(state)
    for step in range(3):
        tokens = random_tokens(seed, step, 0, sequences=config.train.global_batch_size)
        done.results.append(train_step(state, step, share_of(state, tokens)))
        after = _tensors(state)
        done.changed.append([name for name in after if not torch.equal(after[name], before[name])])
        before = after
    return done


def decide_about_one_rank(rank: int, bad_rank: int) -> str | None:
    """The decision where only `bad_rank` sees something that is not finite."""
    return finite_everywhere(rank != bad_rank, 1.0, 1.0)


def _tensors(state: TrainingState) -> dict[str, torch.Tensor]:
    state.settle()
    found = {
        name: tensor.detach().clone()
        for chunk in state.chunks
        for name, tensor in chunk.module.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
    }
    for index, part in enumerate(state.optimizer.chained_optimizers):
        for number, kept in enumerate(part.optimizer.state.values()):
            found |= {f"{index}/{number}/{key}": value.clone() for key, value in kept.items()}
    return found
