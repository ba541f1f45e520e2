"""Nothing of what is saved may hide a value that is not finite, whatever keeps it."""

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hysparse_megatron.checkpoint.finite import _tensors, rank_not_finite
from hysparse_megatron.config.compose import compose
from hysparse_megatron.runtime.process_groups import destroy_process_groups
from hysparse_megatron.training.state import TrainingState, build_state
from hysparse_megatron.training.step import train_step
from tests.unit.single_process import DEVICE
from tests.unit.training.tiny_states import SETTINGS, VOCABULARY, random_batches

EXPERTS = [
    "model.moe.num_experts=4",
    "model.moe.num_active_experts=2",
    "model.moe.router_score=sigmoid",
    "model.moe.balancing=bias",
]


@pytest.fixture(
    params=[[], ["train.precision=bf16"], ["optim.name=muon"], EXPERTS],
    ids=["adamw", "bf16", "muon", "experts"],
)
def state(group: None, request: pytest.FixtureRequest) -> Iterator[TrainingState]:
    built = build_state(compose([*SETTINGS, *request.param]), VOCABULARY, DEVICE)
    train_step(built, 0, random_batches())
    yield built
    destroy_process_groups()


def saved(state: TrainingState) -> dict[str, Tensor]:
    """What a checkpoint holds, in place where this rank has it whole."""
    found: dict[str, Tensor] = {}
    for chunk in state.chunks:
        for name, value in chunk.module.state_dict(keep_vars=True).items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                found[name] = value.detach()
    for index, part in enumerate(state.optimizer.chained_optimizers):
        for group in part.optimizer.param_groups:
            for number, parameter in enumerate(group["params"]):
                found[f"{index} main {number} {group['wd_mult']}"] = parameter.detach()
        for number, kept in enumerate(part.optimizer.state.values()):
            for name, value in kept.items():
                if isinstance(value, Tensor):
                    found[f"{index} {name} {number}"] = value
    return found


def test_one_bad_value_anywhere_is_found(state: TrainingState, seed: int) -> None:
    assert rank_not_finite(state) is None
    looked_at = {tensor.data_ptr() for tensor in _tensors(state)}
    everything = saved(state)
    assert {name for name, t in everything.items() if t.data_ptr() not in looked_at} == set()
    kinds: dict[str, str] = {}
    for name in random.Random(seed).sample(sorted(everything), len(everything)):
        kinds[name.split()[1] if " " in name else name.rpartition(".")[2]] = name
    for name in kinds.values():
        flat = everything[name].view(-1)
        place = random.Random(seed).randrange(len(flat))
        for bad in (torch.nan, torch.inf, -torch.inf):
            kept = flat[place].clone()
            flat[place] = bad
            assert rank_not_finite(state) == 0, (name, place, bad)
            flat[place] = kept
    assert rank_not_finite(state) is None


def test_values_near_the_end_of_their_range_are_finite(state: TrainingState) -> None:
    """Their squares, and their sum, would not be."""
    for chunk in state.chunks:
        for parameter in chunk.parameters():
            parameter.detach().fill_(torch.finfo(parameter.dtype).max)
    assert rank_not_finite(state) is None
