"""Activations that wait for their backward pass in host memory: where they are, and what they are.

On a CPU, where the same hooks copy to other memory of the machine.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, UntypedStorage

from hysparse_megatron.config.compose import compose
from hysparse_megatron.model import offload
from hysparse_megatron.model.offload import Offload
from hysparse_megatron.plan.offload import ON_ITS_WAY
from hysparse_megatron.plan.overview import make_overview
from hysparse_megatron.training.state import TrainingState
from tests.unit.model.late_copies import Late
from tests.unit.single_process import built_state

SEQUENCE, HIDDEN, VOCAB = 64, 32, 96
SIZES = [
    f"model.hidden_size={HIDDEN}",
    "model.ffn_hidden_size=80",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.head_dim=16",
    "model.block_size=8",
    "model.num_selected_blocks=3",
    "model.window=8",
    f"model.vocab_size={VOCAB}",
    f"train.seq_length={SEQUENCE}",
    "train.micro_batch_size=2",
    "train.global_batch_size=2",
]
EXPERTS = [
    "model.moe.num_experts=4",
    "model.moe.num_active_experts=2",
    "model.moe.expert_ffn_hidden_size=48",
    "model.moe.shared_expert_ffn_hidden_size=16",
]
ALL = ["train.offload_activations=true", "train.offload_min_bytes=0"]
RECOMPUTE = [
    "none",
    "full",
    "full train.recompute_layers=2",
    "selective",
    "selective train.recompute_modules=[norm]",
    "selective train.recompute_modules=[attention,norm,FEED_FORWARD]",
]


def settings_of(recompute: str, experts: bool, layout: str) -> list[str]:
    chosen = recompute.replace("FEED_FORWARD", "experts" if experts else "feed_forward")
    own = [f"model.layout={layout}", *(EXPERTS if experts else [])]
    return [*SIZES, *own, *f"train.recompute={chosen}".split()]


def drawn_layout(rng: random.Random) -> str:
    """Six layers: an oracle with readers, the sparse layers where one is before them."""
    rest = [rng.choice("FSW") for _ in range(4)]
    return " ".join(["F", "S", *rest])


def forward(state: TrainingState, seed: int) -> Tensor:
    [chunk] = state.chunks
    chunk.train()
    tokens = torch.randint(VOCAB, (2, SEQUENCE), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(SEQUENCE).expand(2, -1)
    loss: Tensor = chunk(tokens, positions, None, labels=tokens).sum()
    return loss


def gradients(state: TrainingState) -> dict[str, Tensor]:
    return {name: p.main_grad.clone() for name, p in state.chunks[0].named_parameters()}


def offload_of(state: TrainingState) -> Offload:
    assert state.megatron.offload is not None
    return state.megatron.offload


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name, gradient in one.items() if not torch.equal(gradient, other[name])]


def assert_equal_gradients(
    settings: list[str], rng: random.Random, prepare: Callable[[TrainingState], None] | None = None
) -> TrainingState:
    """To the bit, with activations on the host and without. Returns the state, `prepare`d, with."""
    seeds = [rng.randrange(2**31) for _ in range(3)]
    found = []
    for more in ([], ALL):
        with built_state(compose([*settings, *more]), VOCAB) as state:
            if more and prepare is not None:
                prepare(state)
            losses = [forward(state, seed) for seed in seeds[:2]]
            for loss in losses:
                loss.backward()
            forward(state, seeds[2]).backward()
            found.append(gradients(state))
    assert differing(*found) == []
    assert all(gradient.isfinite().all() for gradient in found[0].values())
    return state


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize(
    "experts",
    [False, pytest.param(True, marks=pytest.mark.thorough)],
    ids=["dense", "experts"],
)
def test_gradients_are_equal_to_the_bit(recompute: str, experts: bool, rng: random.Random) -> None:
    """Of two micro-batches in flight at a time and one after them, which finds memory in use."""
    settings = settings_of(recompute, experts, drawn_layout(rng))
    state = assert_equal_gradients(settings, rng)
    out, back = offload_of(state).copied_bytes
    assert 0 < back <= out


def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[UntypedStorage]]:
    """Pieces that are copied to the host, and storages that stay on the device."""
    pieces: list[Any] = []
    staying: list[UntypedStorage] = []
    copy, pack = offload._Link.copy_out, offload._ForwardPass.pack

    def copied(link: Any, storage: UntypedStorage, version: int) -> Any:
        pieces.append(copy(link, storage, version))
        return pieces[-1]

    def packed(keeping: Any, tensor: Tensor) -> Any:
        found = pack(keeping, tensor)
        if isinstance(found, Tensor) and keeping._layer is not None:
            staying.append(found.untyped_storage())
        return found

    monkeypatch.setattr(offload._Link, "copy_out", copied)
    monkeypatch.setattr(offload._ForwardPass, "pack", packed)
    return pieces, staying


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_what_is_copied_leaves_the_device_as_planned(
    recompute: str, experts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*settings_of(recompute, experts, "F S S F S W"), *ALL]
    memory = make_overview(compose(settings), 1).ranks[0].memory
    assert memory.host is not None
    pieces, staying = watched(monkeypatch)
    with built_state(compose(settings), VOCAB) as state:
        loss = forward(state, 0)
        parameters = {p.untyped_storage().data_ptr() for p in state.chunks[0].parameters()}
        [last] = offload_of(state)._link._present  # type: ignore[union-attr]
        # Experts' dispatchers hold the order of their tokens until the next forward pass.
        order = 2 * SEQUENCE * 2 * 8 if experts else 0
        there = [piece for piece in pieces if piece.storage() is not None and piece.size != order]
        loss.backward()

    # Of the layers that are copied only parameters and the table of rotary cosines and sines stay.
    others = {s.data_ptr(): s.nbytes() for s in staying if s.data_ptr() not in parameters}
    table = 2 * SEQUENCE * state.config.model.rotary_dim * 4
    assert sum(others.values()) <= table
    # All that waits has left the device but for the last layer that was copied.
    assert {id(piece) for piece in there} <= {id(piece) for piece in last.pieces}
    held = sum(piece.size for piece in there)
    assert held <= 1.5 * memory.activations[ON_ITS_WAY]

    # On a CPU a norm keeps its normalised input besides.
    row = 2 * SEQUENCE * HIDDEN * 4
    whole = 5 if recompute == "full" else state.config.train.recompute_layers or 0
    measured = sum(piece.size for piece in pieces) - 2 * row * (5 - whole)
    indices = 2 * (2 * 2 * SEQUENCE * 3 * 4)  # of two oracles, which GPUs hold as lists
    assert abs(measured - memory.host.microbatch_bytes) <= 0.05 * measured + indices + table


def test_the_backward_pass_reads_what_is_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each layer's own: a bit that changes there changes gradients."""
    settings = [*settings_of("none", False, "F S S F S W")]
    with built_state(compose(settings), VOCAB) as state:
        forward(state, 1).backward()
        plain = gradients(state)
    pieces, _ = watched(monkeypatch)
    with built_state(compose([*settings, *ALL]), VOCAB) as state:
        loss = forward(state, 1)
        assert len({piece.buffer.data_ptr() for piece in pieces}) == len(pieces)
        for piece in pieces:
            piece.buffer.zero_()
        loss.backward()
        changed = differing(plain, gradients(state))
    assert {int(name.split("layers.")[1].split(".")[0]) for name in changed if "layers." in name}


@pytest.mark.parametrize("recompute", ["none", "full", "selective train.recompute_modules=[norm]"])
def test_whoever_reads_a_copy_waits_for_it(
    recompute: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And memory is given away after its copies; with streams that copy as late as they may."""
    settings = settings_of(recompute, True, drawn_layout(rng))
    late = Late()
    assert_equal_gradients(
        settings, rng, lambda state: late.install(offload_of(state), monkeypatch)
    )
    assert late.copies > 20
    assert late.lost == []


def test_memory_is_used_again_and_evaluation_copies_nothing() -> None:
    with built_state(compose([*settings_of("none", True, "F S S W F S"), *ALL]), VOCAB) as state:
        host = offload_of(state)
        forward(state, 0).backward()
        with torch.no_grad():
            forward(state, 1)
        held, (out, back) = host.host_bytes, host.copied_bytes
        forward(state, 0).backward()
    assert host.copied_bytes == (2 * out, 2 * back)
    assert host.host_bytes == held


def saved_and_read(smallest: int, tensors: list[Tensor], stay: list[Tensor]) -> tuple[Any, Offload]:
    """What comes of tensors that two layers save."""
    host = Offload(smallest)
    with host.forward_pass(torch.device("cpu"), stay) as keep:
        packed = []
        for _ in range(2):
            with keep.layer():
                packed += [keep.pack(tensor) for tensor in tensors]
    return [keep.unpack(each) for each in packed], host


def test_views_of_one_storage_are_copied_once() -> None:
    whole = torch.randn(6, 8)
    views = [whole, whole[1:3], whole.t(), whole.view(-1)[::3]]
    found, host = saved_and_read(0, views, [])
    for tensor, read in zip(views * 2, found, strict=True):
        assert torch.equal(tensor, read)
        assert tensor.stride() == read.stride()
    assert host.copied_bytes == (whole.nbytes, 0), "it is on the device as long as `whole` is"


def test_small_tensors_and_views_of_parameters_stay() -> None:
    parameter = torch.nn.Parameter(torch.randn(64, 64))
    small, large = torch.randn(15), torch.randn(16)
    found, host = saved_and_read(64, [parameter[1:], parameter.t(), small, large], [parameter])
    assert host.copied_bytes == (large.nbytes, 0)
    assert found[0].data_ptr() == parameter[1:].data_ptr()


def test_what_is_saved_once_more_after_a_change_is_copied_once_more() -> None:
    changing = torch.zeros(32)
    host = Offload(0)
    with host.forward_pass(torch.device("cpu"), []) as keep, keep.layer():
        before = keep.pack(changing)
        changing += 1
        after = keep.pack(changing)
    assert host.copied_bytes[0] == 2 * 32 * 4
    assert not keep.unpack(before).any()
    assert keep.unpack(after).all()
    assert host.copied_bytes[1] == 32 * 4, "what has not changed is there"
