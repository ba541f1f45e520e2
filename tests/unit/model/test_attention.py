"""The three attention layers, inside a whole tiny model, against a plain one written anew."""

from typing import Any

import pytest
import torch
from hysparse_kernels import block_sparse_attention
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from plain_model import PlainSettings, token_losses
from tiny_models import SEQUENCE, VARIANTS, randomize, tiny_config, tiny_model
from torch import Tensor
from variants import BATCH, losses_and_picks, plain_settings, random_tokens

from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.config.schema import Config
from hysparse_megatron.model import attend
from hysparse_megatron.model.rotary import cosines_and_sines
from hysparse_megatron.model.sharing import SharedAttention
from tests.unit.single_process import DEVICE


def attend_of(model: HybridModel) -> attend.TrainingAttend:
    stack = model.decoder
    return attend.TrainingAttend(
        config=stack.config, groups=stack.groups, documents=None, training=True
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_agrees_with_the_equations(
    variant: str, groups: ProcessGroupCollection, seed: int
) -> None:
    config = tiny_config(*VARIANTS[variant])
    model = tiny_model(config, groups)
    randomize(model)
    tokens = random_tokens()
    losses, picks = losses_and_picks(model, tokens)
    weight = torch.rand_like(losses) + 0.5
    (losses * weight).sum().backward()

    plain_weights = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in model.named_parameters()
    }
    settings = plain_settings(config)
    expected, scores = token_losses(settings, plain_weights, picks, tokens, tokens.roll(-1, dims=1))
    (expected * weight.double()).sum().backward()

    torch.testing.assert_close(losses.double(), expected, rtol=2e-4, atol=2e-4)
    for name, parameter in model.named_parameters():
        wanted = plain_weights[name].grad
        assert parameter.grad is not None, name
        assert wanted is not None, name
        error = (parameter.grad.double() - wanted).norm() / wanted.norm()
        assert error < 2e-3, f"gradient of {name} is off by {error:.1e}"
        assert wanted.norm() > 0, f"{name} has no influence on this loss"
    assert_best_blocks(settings, config, picks, scores)


def assert_best_blocks(
    settings: PlainSettings, config: Config, picks: dict[int, Tensor], scores: dict[int, Tensor]
) -> None:
    """Every pick is among the best by Eq. 3, up to rounding between nearly equal blocks."""
    read = {plan.oracle for plan in parse_layout(config.model.layout).layers} - {None}
    assert set(picks) == read
    count = config.model.num_selected_blocks
    for layer, chosen in picks.items():
        assert chosen.dtype == torch.int32
        assert chosen.shape == (BATCH, settings.groups, SEQUENCE, count)
        for t in range(SEQUENCE):
            visible = t // settings.block_size + 1
            expected_count = min(count, visible)
            of_token = chosen[:, :, t].long()
            assert ((of_token >= 0).sum(-1) == expected_count).all()
            assert (of_token < visible).all()
            padded = scores[layer][:, :, t].sort(-1, descending=True).values
            threshold = padded[..., expected_count - 1 : expected_count]
            got = scores[layer][:, :, t].gather(-1, of_token.clamp(min=0))
            assert ((got >= threshold * (1 - 1e-3)) | (of_token < 0)).all()


def rotation_of(model: HybridModel) -> Tensor:
    """What a stack gives to its layers: cosines and sines of all positions."""
    return cosines_and_sines(model.rotary_pos_emb(SEQUENCE), 1.0)


def test_only_oracles_that_are_read_share(groups: ProcessGroupCollection, seed: int) -> None:
    model = tiny_model(tiny_config("model.layout=F F S W F"), groups)
    hidden = torch.randn(SEQUENCE, BATCH, 24, device=DEVICE)
    rotary = rotation_of(model)
    shared = None
    made = []
    for layer in model.decoder.layers:
        hidden, shared = layer(hidden, shared, rotary, attend_of(model))
        made.append(shared)
    first, second, sparse, window, last = made
    assert first is None
    assert isinstance(second, SharedAttention)
    assert second.key.shape == (SEQUENCE, BATCH, 2, 8)
    assert second.block_indices is not None
    assert not second.block_indices.requires_grad
    assert sparse is second
    assert window is second
    assert last is None


def test_a_sparse_layer_without_an_oracle_says_so(groups: ProcessGroupCollection) -> None:
    model = tiny_model(tiny_config("model.layout=F S F"), groups)
    hidden = torch.randn(SEQUENCE, BATCH, 24, device=DEVICE)
    with pytest.raises(ValueError, match="sparse layer 1 got no key"):
        model.decoder.layers[1](hidden, None, rotation_of(model), attend_of(model))


def test_oracle_keys_and_values_collect_gradient_from_every_reader(
    groups: ProcessGroupCollection, seed: int
) -> None:
    model = tiny_model(tiny_config("model.layout=F S S F"), groups)
    randomize(model)
    oracle, *readers = (model.decoder.layers[index].self_attention for index in range(3))
    rotary = rotation_of(model)
    inputs = [torch.randn(SEQUENCE, BATCH, 24, device=DEVICE) for _ in range(3)]
    weights = [torch.randn(SEQUENCE, BATCH, 24, device=DEVICE) for _ in range(3)]

    def gradient(which: list[int]) -> Tensor:
        """Of the oracle's projection, from the outputs of the layers in `which`."""
        attend = attend_of(model)
        (output, _), shared = oracle(inputs[0], None, rotary, attend)
        outputs = [
            output,
            *(r(x, shared, rotary, attend)[0][0] for r, x in zip(readers, inputs[1:], strict=True)),
        ]
        loss = sum((outputs[index] * weights[index]).sum() for index in which)
        (found,) = torch.autograd.grad(loss, oracle.linear_qkv.linear.weight)
        return found.unflatten(0, (2, -1))  # [groups, 2 queries, key, value of 8 channels, C]

    alone = [gradient([index]) for index in range(3)]
    together = gradient([0, 1, 2])
    # Entries are sums over all tokens, some of which cancel.
    largest = max(float(part.abs().max()) for part in alone)
    torch.testing.assert_close(together, sum(alone), rtol=0, atol=1e-5 * largest)
    for reader in alone[1:]:
        assert reader[:, :16].abs().max() == 0, "a reader must not reach the oracle's queries"
        assert reader[:, 16:24].abs().max() > 0
        assert reader[:, 24:].abs().max() > 0


def test_nothing_stays_on_a_module_between_calls(groups: ProcessGroupCollection) -> None:
    model = tiny_model(tiny_config("model.layout=F S W F"), groups)
    losses_and_picks(model, random_tokens())  # the rotary embedding may cache its table here

    def contents() -> dict[str, dict[str, int]]:
        return {
            name: {key: id(value) for key, value in vars(module).items()}
            for name, module in model.named_modules()
            if name.startswith("decoder")
        }

    before = contents()
    losses, _ = losses_and_picks(model, random_tokens())
    assert contents() == before
    losses.sum().backward()
    assert contents() == before


EXPERTS = (
    "model.moe.num_experts=4 model.moe.num_active_experts=2 model.moe.expert_ffn_hidden_size=24 "
    "model.moe.shared_expert_ffn_hidden_size=16 model.moe.num_dense_first_layers=1"
)


@pytest.mark.parametrize(
    "recompute",
    [
        "selective",
        "full",
        "selective train.recompute_modules=[norm]",
        "selective train.recompute_modules=[norm,feed_forward]",
        "selective train.recompute_modules=[attention,norm,experts] " + EXPERTS,
        "selective train.recompute_modules=[feed_forward,experts] " + EXPERTS,
        "full train.recompute_layers=1",
        "full train.recompute_layers=3",
    ],
)
def test_recompute_changes_no_bit(
    recompute: str, groups: ProcessGroupCollection, seed: int
) -> None:
    gradients = []
    losses = []
    tokens = random_tokens()
    weights = None
    experts = EXPERTS if EXPERTS in recompute else ""
    for kind in (f"none {experts}", recompute):
        settings = f"model.layout=F_S_W_F_S train.recompute={kind}".split()
        settings[0] = settings[0].replace("_", " ")
        model = tiny_model(tiny_config(*settings), groups)
        if weights is None:
            randomize(model)
            weights = model.state_dict()
        else:
            model.load_state_dict(weights)
        found, _ = losses_and_picks(model, tokens)
        found.sum().backward()
        losses.append(found.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert torch.equal(*losses)
    for name in gradients[0]:
        assert torch.equal(gradients[0][name], gradients[1][name]), name


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_readers_add_their_gradients_in_one_sum(
    groups: ProcessGroupCollection, seed: int, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = ["model.layout=F S S F S", f"train.recompute={recompute}"]
    model = tiny_model(tiny_config(*layouts), groups)
    sums = []

    def recorded(*arguments: Any, **options: Any) -> Tensor:
        sums.append(options["accumulate"])
        return block_sparse_attention(*arguments, **options)

    monkeypatch.setattr(attend, "block_sparse_attention", recorded)
    losses_and_picks(model, random_tokens())[0].sum().backward()
    if recompute == "none":
        first, second, other = sums
        assert first is second is not None
        assert other not in (None, first)
    else:
        assert set(sums) == {None}
    sums.clear()
    model.eval()
    losses_and_picks(model, random_tokens())
    assert set(sums) == {None}
