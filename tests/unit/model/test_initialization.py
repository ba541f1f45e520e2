"""Initial weights: from the seed alone, different in every layer."""

import itertools

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from tiny_models import VOCABULARY, tiny_config, tiny_model

from hysparse_megatron.model.builder import build_chunks
from hysparse_megatron.model.initialization import draw_weights
from hysparse_megatron.model.megatron_config import make_megatron_config
from tests.unit.single_process import DEVICE

LAYOUT = "model.layout=F S S W F"


def test_the_seed_decides_and_nothing_else(groups: ProcessGroupCollection) -> None:
    first = tiny_model(tiny_config(LAYOUT), groups).state_dict()
    torch.manual_seed(99)
    torch.rand(7)
    again = tiny_model(tiny_config(LAYOUT), groups).state_dict()
    other = tiny_model(tiny_config(LAYOUT, "train.seed=77"), groups).state_dict()
    assert first.keys() == again.keys()
    for name, weight in first.items():
        if not isinstance(weight, torch.Tensor):
            continue
        assert torch.equal(weight, again[name]), name
        if "norm" not in name and "sink" not in name:
            assert not torch.equal(weight, other[name]), name


def test_a_layer_does_not_depend_on_its_neighbours(groups: ProcessGroupCollection) -> None:
    """Layer 3 is the same in two models whose layers 1 and 2 are of other kinds."""
    first = dict(tiny_model(tiny_config("model.layout=F S S F F"), groups).named_parameters())
    other = dict(tiny_model(tiny_config("model.layout=F W W F F"), groups).named_parameters())
    names = [name for name in first if name.startswith("decoder.layers.3.")]
    assert len(names) == 6
    for name in [*names, "embedding.word_embeddings.weight", "output_layer.weight"]:
        assert torch.equal(first[name], other[name]), name


def test_layers_differ_and_have_the_configured_spread(groups: ProcessGroupCollection) -> None:
    wide = ("model.hidden_size=128", "model.ffn_hidden_size=256", "model.init_std=0.05")
    model = tiny_model(tiny_config("model.layout=F F F", *wide), groups)
    weights = dict(model.named_parameters())
    for part, std in (
        ("self_attention.linear_qkv.linear.weight", 0.05),
        ("mlp.linear_fc1.weight", 0.05),
        # What writes into the residual stream is smaller by sqrt(2 * layers).
        ("self_attention.linear_proj.weight", 0.05 / 6**0.5),
        ("mlp.linear_fc2.weight", 0.05 / 6**0.5),
    ):
        layers = [weights[f"decoder.layers.{index}.{part}"] for index in range(3)]
        for one, two in itertools.combinations(layers, 2):
            assert not torch.equal(one, two)
            assert abs(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1]) < 0.1
        for layer in layers:
            assert abs(layer.std().item() / std - 1) < 0.1
            assert abs(layer.mean().item()) < 0.1 * std
    tables = [
        weights[name][:VOCABULARY]
        for name in ("output_layer.weight", "embedding.word_embeddings.weight")
    ]
    for table in tables:
        assert abs(table.std().item() / 0.05 - 1) < 0.1
    assert not torch.equal(*tables)


def test_sinks_start_at_zero_in_fp32_and_norms_at_one(groups: ProcessGroupCollection) -> None:
    config = tiny_config("model.layout=F S W F", "train.precision=bf16", "model.qk_norm=true")
    weights = dict(tiny_model(config, groups).named_parameters())
    sinks = {name: weight for name, weight in weights.items() if "sink" in name}
    assert len(sinks) == 3
    for sink in sinks.values():
        assert sink.dtype == torch.float32
        assert torch.equal(sink.cpu(), torch.zeros(4))
    norms = [weight for name, weight in weights.items() if "norm" in name]
    assert len(norms) == 4 * 4 + 1
    assert all((norm == 1).all() for norm in norms)
    rest = [w for n, w in weights.items() if "sink" not in n]
    assert all(weight.dtype == torch.bfloat16 for weight in rest)


def test_tied_embeddings_are_one_parameter(groups: ProcessGroupCollection) -> None:
    model = tiny_model(tiny_config(LAYOUT, "model.tie_embeddings=true"), groups)
    untied = tiny_model(tiny_config(LAYOUT), groups)
    names = {name for name, _ in model.named_parameters()}
    assert {name for name, _ in untied.named_parameters()} - names == {"output_layer.weight"}
    assert model.shared_embedding_or_output_weight() is model.embedding.word_embeddings.weight
    tokens = torch.zeros(1, 4, dtype=torch.long, device=DEVICE)
    positions = torch.arange(4, device=DEVICE)[None]
    model(tokens, positions, None, labels=tokens).sum().backward()
    gradient = model.embedding.word_embeddings.weight.grad
    assert gradient[5].abs().max() > 0  # a token that never occurs: reached through the output


def test_the_vocabulary_is_padded_to_whole_multiples(groups: ProcessGroupCollection) -> None:
    model = tiny_model(tiny_config("model.layout=F"), groups)
    assert model.embedding.word_embeddings.weight.shape == (128, 24)


def test_all_that_is_built_without_values_gets_some(groups: ProcessGroupCollection) -> None:
    settings = (
        "model.layout=F S W F", "model.moe.num_experts=3", "model.moe.num_active_experts=2",
        "model.moe.expert_ffn_hidden_size=12", "model.moe.shared_expert_ffn_hidden_size=8",
        "model.moe.num_dense_first_layers=1", "model.qk_norm=true", "model.qkv_bias=true",
    )  # fmt: skip
    config = tiny_config(*settings)
    megatron = make_megatron_config(config)
    (model,) = build_chunks(config, megatron, VOCABULARY, groups, draw=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    draw_weights(model, megatron, groups)
    weights = dict(model.named_parameters())
    left = {name for name, weight in weights.items() if weight.isnan().any()}
    assert left == {name for name in weights if "norm" in name or name.endswith("_sink")}
    assert {name.rsplit(".", 1)[1] for name in weights.keys() - left} == {"weight", "bias"}
    for name in weights.keys() - left:
        assert bool((weights[name] == 0).all()) == name.endswith("bias"), name


def test_experts_differ(groups: ProcessGroupCollection) -> None:
    settings = (
        "model.layout=F F", "model.moe.num_experts=3", "model.moe.num_active_experts=2",
        "model.moe.expert_ffn_hidden_size=15", "model.moe.shared_expert_ffn_hidden_size=8",
    )  # fmt: skip
    weights = dict(tiny_model(tiny_config(*settings), groups).named_parameters())
    for part in ("linear_fc1", "linear_fc2"):
        drawn = [
            weights[f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.{part}.weight"]
            for layer in range(2)
            for expert in range(3)
        ]
        # The first numbers of an expert are nowhere among those of another.
        for one, two in itertools.combinations(drawn, 2):
            assert not torch.isin(one.flatten()[:20], two).any()
