"""What a model computes for a token on a GPU does not depend on the tokens after it.

Of each kernel this follows from the comparison with a reference; here it is the whole model, in the
precision and shapes in which models are trained, so that nothing between the kernels leaks either.
"""

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hysparse_megatron.config.compose import compose
from hysparse_megatron.runtime.process_groups import destroy_process_groups
from hysparse_megatron.training.state import TrainingState, build_state
from tests.unit.single_process import DEVICE, default_group

LENGTH, VOCABULARY = 2048, 512
LAYOUTS = ["12*F", "3*(F 3*S)", "3*(F 3*W)"]


@pytest.fixture(params=LAYOUTS)
def state(request: pytest.FixtureRequest) -> Iterator[TrainingState]:
    settings = [
        *("model=study_92m", f"model.layout={request.param}", f"model.vocab_size={VOCABULARY}"),
        *(f"train.seq_length={LENGTH}", "train.precision=bf16", "train.micro_batch_size=1"),
        # So that attention is far from uniform, and what is selected matters.
        *("model.init_std=0.1", "train.global_batch_size=1"),
    ]
    with default_group():
        yield build_state(compose(settings), VOCABULARY, DEVICE)
        destroy_process_groups()


def losses(state: TrainingState, tokens: Tensor) -> Tensor:
    """[S] of tokens [S + 1]."""
    positions = torch.arange(LENGTH, device=DEVICE).unsqueeze(0)
    labels = torch.zeros_like(tokens[1:])  # the same whatever follows
    found: Tensor = state.models[0](
        tokens[:-1].unsqueeze(0), positions, None, labels=labels.unsqueeze(0)
    )
    return found.detach()[0]


@pytest.mark.parametrize("training", [True, False])
def test_losses_do_not_depend_on_later_tokens(
    state: TrainingState, training: bool, seed: int
) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    state.models[0].train(training)
    tokens = torch.randint(0, VOCABULARY, (LENGTH + 1,), device=DEVICE)
    before = losses(state, tokens)
    again = losses(state, tokens)
    assert torch.equal(before, again)  # or equality would say nothing
    for border in (rng.randrange(1, LENGTH), LENGTH - rng.randrange(1, 64)):
        changed = tokens.clone()
        changed[border:] = torch.randint(0, VOCABULARY, (LENGTH + 1 - border,), device=DEVICE)
        after = losses(state, changed)
        assert torch.equal(before[:border], after[:border]), border
        assert not torch.equal(before[border:], after[border:])
