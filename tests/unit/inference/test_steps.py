"""How decode steps are launched: one by one here, and why not as a graph."""

from pathlib import Path

import pytest
import torch
from hysparse_kernels import Chunk
from megatron.core.process_groups_config import ProcessGroupCollection

from hysparse_megatron.inference.forward import advance, logits_of
from hysparse_megatron.inference.generate import CacheDtype, new_cache, prefill
from hysparse_megatron.inference.load import LoadedModel
from hysparse_megatron.inference.steps import EagerSteps, GraphedSteps, why_no_graph
from tests.unit.model.tiny_models import VOCABULARY, randomize, tiny_config, tiny_model
from tests.unit.single_process import DEVICE

CPU = torch.device("cpu")


@pytest.fixture
def loaded(groups: ProcessGroupCollection, seed: int) -> LoadedModel:
    # All blocks of these lengths: rounding cannot change what is selected.
    config = tiny_config("model.layout=F S W F S", "model.num_selected_blocks=8")
    model = tiny_model(config, groups).eval()
    randomize(model)
    return LoadedModel(config, model, groups, DEVICE, VOCABULARY, Path(), None)


def prompts(*lengths: int) -> list[list[int]]:
    return [torch.randint(0, VOCABULARY, (length,)).tolist() for length in lengths]


def test_steps_of_some_rows(loaded: LoadedModel) -> None:
    """As `advance` row by row."""
    texts = prompts(9, 1, 14)
    caches = [new_cache(loaded, [17, 9, 22], CacheDtype.model) for _ in range(2)]
    for cache in caches:
        prefill(loaded, cache, texts, 5)
    steps = EagerSteps(loaded, caches[0])
    for rows in ([0, 1, 2], [0, 2], [2], [1]):
        tokens = torch.randint(0, VOCABULARY, (len(rows),)).tolist()
        found = steps.logits(rows, tokens)
        assert found.shape[0] == len(rows)
        for row, token, logits in zip(rows, tokens, found, strict=True):
            hidden = advance(loaded.model, caches[1], [row], [[token]])
            wanted = logits_of(loaded.model, hidden)[0, 0]
            # Ten times what rounding made of the worst of some thousand drawn models.
            torch.testing.assert_close(logits, wanted, rtol=0, atol=3e-4 * wanted.abs().max())
    assert caches[0].lengths == caches[1].lengths == [11, 3, 17]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_recorded(loaded: LoadedModel) -> None:
    cache = new_cache(loaded, [5], CacheDtype.model)
    assert why_no_graph(loaded, cache) == "there is no CUDA device"
    with pytest.raises(ValueError, match="cannot be recorded: there is no CUDA device"):
        GraphedSteps(loaded, cache)


def test_a_replayed_chunk_reads_its_numbers_on_the_device() -> None:
    chunk = Chunk.replayed([2, 0], [7, 5], CPU)
    assert (chunk.rows, chunk.past, chunk.new) == ((2, 0), (6, 4), (1, 1))
    assert chunk.on_device.tolist() == [[2, 0], [0, 0], [1, 1]]
    chunk.on_device[1] = torch.tensor([3, 1])
    assert chunk.positions.tolist() == [[3], [1]]
