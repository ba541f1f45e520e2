"""Which layers stay full: by what the model loses without them, on a model of window layers."""

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.data.read.held_out import EvaluationBatches
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.evaluation.held_out import token_losses
from hysparse_megatron.evaluation.placement import Placement, layout_of
from hysparse_megatron.evaluation.positions import loss_by_position
from hysparse_megatron.inference.load import LoadedModel, build_model
from hysparse_megatron.runtime.process_groups import destroy_process_groups
from tests.unit.model.tiny_models import SEQUENCE, VOCABULARY, randomize, tiny_config
from tests.unit.single_process import DEVICE, default_group

pytestmark = pytest.mark.usefixtures("seed")

LAYERS = 4


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with default_group():
        yield
        destroy_process_groups()


def random_model(layout: str) -> LoadedModel:
    destroy_process_groups()
    config = tiny_config(f"model.layout={layout}")
    model, groups = build_model(config, DEVICE, VOCABULARY)
    torch.manual_seed(random.getrandbits(31))  # building a model seeds anew
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("window_sink"):
                parameter.fill_(-torch.inf)  # windows that see all are full attention then
    return LoadedModel(config, model, groups, DEVICE, VOCABULARY, Path("none"), None)


def random_batches() -> EvaluationBatches:
    rows = torch.randint(0, VOCABULARY, (6, SEQUENCE + 1)).numpy()
    samples = SimpleNamespace(
        seq_length=SEQUENCE, num_held_out=len(rows), held_out_ids=np.arange,
        read=lambda ids: rows[ids],
    )  # fmt: skip
    return EvaluationBatches(
        samples,  # type: ignore[arg-type]
        num_samples=6, global_batch_size=3, micro_batch_size=3,
    )  # fmt: skip


def loss_of(loaded: LoadedModel, batches: EvaluationBatches) -> float:
    return loss_by_position(token_losses(loaded, batches), 1)[0].loss


@pytest.mark.parametrize("full", [[], [0], [0, 2], [1, 3], [0, 1, 2, 3]], ids=str)
def test_losses_are_those_of_a_model_with_these_layers_full(full: list[int]) -> None:
    windows, batches = random_model(f"{LAYERS}*W"), random_batches()
    before = loss_of(windows, batches)
    found = Placement(windows, batches, SEQUENCE).loss(full)
    assert loss_of(windows, batches) == before  # the windows are back
    letters = "".join("F" if layer in full else "W" for layer in range(LAYERS))
    other = random_model(letters)
    missing = other.model.load_state_dict(windows.model.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all(name.endswith("window_sink") for name in missing.unexpected_keys)
    assert found == pytest.approx(loss_of(other, batches), rel=1e-5)
    assert (found != before) == bool(full)


def test_the_best_layer_comes_next() -> None:
    windows, batches = random_model(f"{LAYERS}*W"), random_batches()
    placement = Placement(windows, batches, SEQUENCE)
    first, second = placement.choose(3)
    assert set(first.losses) == {1, 2, 3}
    assert first.losses == {n: placement.loss([0, n]) for n in (1, 2, 3)}
    assert first.layer == min(first.losses, key=first.losses.__getitem__)
    assert set(second.losses) == {1, 2, 3} - {first.layer}
    assert second.losses == {n: placement.loss([0, first.layer, n]) for n in second.losses}
    assert second.layer == min(second.losses, key=second.losses.__getitem__)
    assert list(placement.choose(1)) == []


def test_other_layers_are_refused() -> None:
    loaded = random_model("F S W")
    with pytest.raises(ConfigError, match=r'kind F, S; allowed is W alone: .* --layout "3\*W"'):
        Placement(loaded, random_batches(), SEQUENCE)


def test_layouts_are_written_as_they_are_read() -> None:
    assert layout_of([0, 5, 7], 8) == "F 4*S F S F"
    for _ in range(20):
        full = {0} | {n for n in range(random.randint(1, 40)) if random.random() < 0.3}
        kinds = parse_layout(layout_of(sorted(full), 41)).kinds
        assert [n for n, kind in enumerate(kinds) if kind is LayerKind.FULL] == sorted(full)
        assert len(kinds) == 41
