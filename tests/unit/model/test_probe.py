"""What a probe finds, against the plain model's dense softmax; and that it leaves nothing."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hysparse_kernels import has_a_choice, oracle_attention, selected_mass, shared_blocks
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from plain_model import token_losses
from tiny_models import SEQUENCE, VARIANTS, randomize, tiny_config, tiny_megatron_config, tiny_model
from torch import Tensor
from variants import losses_and_picks, plain_settings, random_tokens

from hysparse_megatron.config.schema import Config
from hysparse_megatron.model import attend
from hysparse_megatron.model import probe as probe_module
from hysparse_megatron.model.probe import NUM_QUERIES, Probe, sample_positions
from tests.unit.single_process import DEVICE

BATCH = 2
SHARED = [name for name in VARIANTS if name != "window and blocks longer than the text"]


@pytest.fixture(autouse=True)
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "NUM_QUERIES", 11)


def probe_of(config: Config, model: HybridModel, groups: ProcessGroupCollection) -> Probe:
    return Probe([model], tiny_megatron_config(config), groups, SEQUENCE, DEVICE)


def forward(model: HybridModel, tokens: Tensor, documents: PackedSeqParams | None = None) -> Tensor:
    positions = torch.arange(SEQUENCE, device=tokens.device).expand(BATCH, SEQUENCE)
    labels = tokens.roll(-1, dims=1)
    with torch.no_grad():
        return model(tokens, positions, None, labels=labels, packed_seq_params=documents)


@pytest.fixture
def model_of(groups: ProcessGroupCollection, seed: int) -> Iterator[Any]:
    def make(*overrides: str) -> tuple[Config, HybridModel]:
        config = tiny_config(*overrides)
        model = tiny_model(config, groups)
        randomize(model)
        return config, model.eval()

    return make


@pytest.mark.parametrize("variant", SHARED)
def test_values_are_those_of_the_dense_softmax(
    variant: str, model_of: Any, groups: ProcessGroupCollection
) -> None:
    config, model = model_of(*VARIANTS[variant])
    probe = probe_of(config, model, groups)
    tokens = random_tokens()
    with probe.watching():
        forward(model, tokens)
    found = probe.gather()
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    _, picks = losses_and_picks(model, tokens)
    seen: dict[int, dict[str, Tensor]] = {}
    token_losses(plain_settings(config), weights, picks, tokens, tokens.roll(-1, dims=1), seen)
    expected = expected_values(config, probe.positions, picks, seen, weights)
    assert found.values == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert set(found.selections) == set(picks)
    for layer, rows in found.selections.items():
        picked = picks[layer][0, 0, found.positions].tolist()
        assert rows == [[block for block in row if block >= 0] for row in picked]
    assert found.document_starts == [0] * 11
    assert 0 < found.seconds < 10


def expected_values(
    config: Config,
    positions: list[int],
    picks: dict[int, Tensor],
    seen: dict[int, dict[str, Tensor]],
    weights: dict[str, Tensor],
) -> dict[str, float]:
    """By loops over queries and sets of blocks."""
    model, values = config.model, {}
    per_group = model.num_attention_heads // model.num_query_groups
    for layer, parts in seen.items():
        for name in ("sparse_gate", "window_gate"):
            if name in parts:
                values[f"{name}/layer_{layer:03}"] = parts[name][:, positions].mean().item()
        if layer not in picks:
            continue
        masses, agreements = [], []
        # Whoever sees no more blocks than it may select reads everything.
        for t in (t for t in positions if t // model.block_size >= model.num_selected_blocks):
            for b in range(BATCH):
                for head in range(model.num_attention_heads):
                    read = set(picks[layer][b, head // per_group, t].tolist())
                    tokens = [j for j in range(t + 1) if j // model.block_size in read]
                    masses.append(parts["probability"][b, head, t, tokens].sum().item())
                for group in range(model.num_query_groups):
                    now = set(picks[layer][b, group, t].tolist())
                    before = set(picks[layer][b, group, t - 1].tolist())
                    agreements.append(len(now & before) / len(now))
        values[f"oracle_mass/layer_{layer:03}"] = sum(masses) / len(masses)
        values[f"neighbour_agreement/layer_{layer:03}"] = sum(agreements) / len(agreements)
    for name, weight in weights.items():
        if name.endswith("_sink"):
            _, _, layer_name, _, sink = name.split(".")
            values[f"{sink}/layer_{int(layer_name):03}"] = weight.mean().item()
    return values


def test_where_all_is_read_there_is_no_mass_to_tell(
    model_of: Any, groups: ProcessGroupCollection
) -> None:
    config, model = model_of("model.layout=F S F", "model.num_selected_blocks=30")
    probe = probe_of(config, model, groups)
    with probe.watching():
        forward(model, random_tokens())
    found = probe.gather()
    assert not any(name.startswith(("oracle_mass", "neighbour")) for name in found.values)
    assert {"sparse_gate/layer_001", "window_sink/layer_001"} <= found.values.keys()


def test_documents(
    model_of: Any, groups: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model = model_of("model.layout=F S F", "model.num_selected_blocks=1")
    probe = probe_of(config, model, groups)
    cut = int(torch.randint(1, SEQUENCE - 10, ()))
    offsets = torch.tensor([0, cut, SEQUENCE, 2 * SEQUENCE], dtype=torch.int32, device=DEVICE)
    documents = PackedSeqParams(
        qkv_format="sbhd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=SEQUENCE,
        max_seqlen_kv=SEQUENCE,
    )
    calls: list[tuple[Tensor, Tensor, Any]] = []

    def recorded(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        result = oracle_attention(query, key, value, **options)
        calls.append((query, key, result))
        return result

    monkeypatch.setattr(attend, "oracle_attention", recorded)
    with probe.watching():
        forward(model, random_tokens(), documents)
    found = probe.gather()
    query, key, result = calls[0]
    at, block = probe.positions, config.model.block_size
    mass = selected_mass(
        query, key, result.block_indices, result.lse, block_size=block, cu_seqlens=offsets
    )
    chosen = has_a_choice(
        torch.arange(SEQUENCE, device=DEVICE),
        1,
        block_size=block,
        batch=BATCH,
        sequence=SEQUENCE,
        cu_seqlens=offsets,
    )[:, None, at]
    expected = mass[:, :, at][chosen.expand(-1, 4, -1)].mean().item()
    assert found.values["oracle_mass/layer_000"] == pytest.approx(expected, rel=1e-5)
    indices = result.block_indices
    shares = shared_blocks(indices[:, :, [t - 1 for t in at]], indices[:, :, at])
    expected = shares[chosen.expand(-1, 2, -1)].mean().item()
    assert found.values["neighbour_agreement/layer_000"] == pytest.approx(expected)
    assert found.document_starts == [0 if t < cut else cut for t in at]


def test_only_the_first_micro_batch_is_seen(model_of: Any, groups: ProcessGroupCollection) -> None:
    config, model = model_of("model.layout=F S W F")
    probe = probe_of(config, model, groups)
    first, second = random_tokens(), random_tokens()
    with probe.watching():
        forward(model, first)
        forward(model, second)
    found = probe.gather()
    with probe.watching():
        forward(model, first)
    assert probe.gather().values == found.values
    with probe.watching():
        forward(model, second)
    assert probe.gather().values != found.values


def test_nothing_is_left_and_nothing_changes(model_of: Any, groups: ProcessGroupCollection) -> None:
    config, model = model_of("model.layout=F S W F")

    def contents() -> dict[str, dict[str, int]]:
        return {
            name: {key: id(value) for key, value in vars(module).items()}
            for name, module in model.named_modules()
        }

    tokens = random_tokens()
    expected = forward(model, tokens)
    before = contents()
    probe = probe_of(config, model, groups)
    with probe.watching():
        assert contents() != before
        assert torch.equal(forward(model, tokens), expected)
    assert contents() == before
    with pytest.raises(ZeroDivisionError), probe.watching():
        raise ZeroDivisionError
    assert contents() == before


@pytest.mark.parametrize("length", [1, 5, 11, 12, 64, 8192, 32768])
def test_positions_are_spread_and_at_no_fixed_place_of_a_block(length: int) -> None:
    found = sample_positions(int(torch.randint(0, 2**31, ())), length)
    assert len(found) == min(11, length)
    assert all(0 <= t < length for t in found)
    edges = [length * part // len(found) for part in range(len(found) + 1)]
    assert all(edges[i] <= t < edges[i + 1] for i, t in enumerate(found))
    if length > 1000:
        assert len({t % 64 for t in found}) > 3
    assert NUM_QUERIES == 32
