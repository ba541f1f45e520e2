"""The planner's bytes against tensors that a training step really keeps."""

import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from hysparse_megatron.architecture.layers import Branch, LayerKind
from hysparse_megatron.architecture.stages import plan_pipeline
from hysparse_megatron.checkpoint.moments import distributed_parts
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import OptimizerName, Precision
from hysparse_megatron.config.validate import validate
from hysparse_megatron.model import attend
from hysparse_megatron.model.language_model import LanguageModel
from hysparse_megatron.model.remade import Remade
from hysparse_megatron.plan.memory import in_flight, state_bytes
from hysparse_megatron.plan.overview import make_overview
from hysparse_megatron.training.muon import matrix_parts
from hysparse_megatron.training.state import TrainingState
from tests.unit.single_process import built_state

pytestmark = pytest.mark.thorough

SEQUENCE, HIDDEN, VOCAB = 256, 64, 128
SMALL = [
    f"model.hidden_size={HIDDEN}",
    "model.ffn_hidden_size=160",
    f"model.vocab_size={VOCAB}",
    "model.tie_embeddings=false",
    f"train.seq_length={SEQUENCE}",
    "train.global_batch_size=1",
    "train.micro_batch_size=1",
]
EXPERTS = [
    "model.moe.num_experts=8",
    "model.moe.num_active_experts=2",
    "model.moe.expert_ffn_hidden_size=96",
    "model.moe.shared_expert_ffn_hidden_size=48",
]


def kept_bytes(state: TrainingState) -> int:
    """Storage that autograd holds after a forward pass, parameters not counted."""
    [chunk] = state.chunks
    parameters = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Detached: neither the graph nor this function, which it holds, may hold the graph.
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor.detach()

    pack = Remade._pack

    def packed(remade: Remade, tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        """Hooks within others are asked in their place."""
        found = pack(remade, tensor)
        return keep(found) if isinstance(found, Tensor) else found

    tokens = torch.randint(0, VOCAB, (1, SEQUENCE))
    chunk.train()
    watched = mock.patch.object(Remade, "_pack", packed)
    with watched, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunk(tokens, torch.arange(SEQUENCE)[None], None, labels=tokens)
    return sum(
        tensor.untyped_storage().nbytes()
        for storage, tensor in kept.items()
        if storage not in parameters
    )


HYBRID = "F S S S S F"
RECOMPUTE = [
    *itertools.product(["F F F F F F", "W W W W W W", HYBRID], ["none", "selective", "full"]),
    (HYBRID, "full train.recompute_layers=2"),
    (HYBRID, "selective train.recompute_modules=[norm]"),
    (HYBRID, "selective train.recompute_modules=[attention,norm,FEED_FORWARD]"),
]


@pytest.mark.parametrize(("layout", "recompute"), RECOMPUTE)
@pytest.mark.parametrize("experts", [[], EXPERTS], ids=["dense", "experts"])
def test_activations_are_those_that_autograd_keeps(
    layout: str, experts: list[str], recompute: str
) -> None:
    chosen = recompute.replace("FEED_FORWARD", "experts" if experts else "feed_forward")
    settings = f"train.recompute={chosen}".split()
    config = compose([f"model.layout={layout}", *SMALL, *experts, *settings])
    assert validate(config, world_size=1) == []
    with built_state(config, VOCAB) as state:
        measured = kept_bytes(state)
    rows = SEQUENCE * HIDDEN * 4
    # The head, which the planner counts as working set: norm, projection, softmax.
    measured -= 2 * rows + SEQUENCE * VOCAB * 4
    # On a CPU a norm keeps its normalised input besides; on a GPU it is one kernel.
    whole = 0 if recompute != "full" else 6
    whole = config.train.recompute_layers or whole
    measured -= rows * (1 + 2 * (6 - whole))
    planned = make_overview(config, 1).ranks[0].memory.activation_bytes
    # One table of rotary angles and a few index tensors, whatever the depth, are left out.
    table = SEQUENCE * config.model.rotary_dim * 4 + 8192
    assert abs(planned - measured) <= max(0.05 * measured, table)


BRANCHES = {
    "oracle_attention": Branch.FULL,
    "block_sparse_attention": Branch.SELECTED,
    "sliding_window_attention": Branch.WINDOW,
}


@pytest.mark.parametrize(
    "recompute",
    [
        "none",
        "none train.loss_chunk=60",
        "full",
        "full train.loss_chunk=60",
        "full train.recompute_layers=2",
        "selective",
        "selective train.recompute_modules=[norm,feed_forward]",
    ],
)
def test_what_is_planned_to_be_recomputed_is(
    recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLOPs of all that is computed forwards in a step, in its backward pass too."""
    config = compose([f"model.layout={HYBRID} W", *SMALL, *f"train.recompute={recompute}".split()])
    done: list[float] = []

    def projected(module: torch.nn.Module, given: Any, result: Any) -> None:
        done.append(2.0 * module.weight.numel() * given[0].shape[0] / SEQUENCE)

    def watched(name: str) -> None:
        real, branch = getattr(attend, name), BRANCHES[name]
        kinds = (kind for kind in LayerKind if branch in kind.branches)
        flops = config.model.attention(next(kinds)).flops(SEQUENCE)[branch]

        def counted(*given: Any, **options: Any) -> Any:
            done.append(flops)
            return real(*given, **options)

        monkeypatch.setattr(attend, name, counted)

    for name in BRANCHES:
        watched(name)
    with built_state(config, VOCAB) as state:
        (chunk,) = state.chunks
        chunk.train()
        for module in chunk.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                module.register_forward_hook(projected)
        tokens = torch.randint(0, VOCAB, (1, SEQUENCE))
        loss = chunk(tokens, None, None, labels=tokens).sum()
        forward = sum(done)
        done.clear()
        loss.backward()
    overview = make_overview(config, 1)
    # Sinks are counted like weights.
    assert forward == pytest.approx(overview.flops.total, rel=1e-3)
    planned = overview.training_flops_per_token - 3 * overview.flops.total
    assert sum(done) == pytest.approx(planned, rel=1e-3, abs=1)


def test_logits_are_those_of_one_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 tokens of 256: five chunks, made once more in the backward pass, and nothing kept."""
    compute, rows = LanguageModel.compute_language_model_loss, []

    def counted(model: LanguageModel, labels: Tensor, logits: Tensor) -> Tensor:
        rows.append(logits.shape[0])
        return compute(model, labels, logits)

    monkeypatch.setattr(LanguageModel, "compute_language_model_loss", counted)
    kept = []
    for chunk in ("null", "60"):
        config = compose(["model.layout=W F", *SMALL, f"train.loss_chunk={chunk}"])
        with built_state(config, VOCAB) as state:
            kept.append(kept_bytes(state))
            tokens = torch.randint(0, VOCAB, (1, SEQUENCE))
            rows.clear()
            state.chunks[0](tokens, None, None, labels=tokens).sum().backward()
    assert rows == [*[60] * 4, 16, 16, *[60] * 4]
    # The softmax of all tokens is gone; labels take its place.
    assert kept[1] <= kept[0] - SEQUENCE * VOCAB * 4 + SEQUENCE * 16


@pytest.mark.parametrize("experts", [[], EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_weights_gradients_and_moments_are_those_of_the_optimizer(
    optim: str, experts: list[str], precision: str
) -> None:
    settings = [f"optim={optim}", f"train.precision={precision}"]
    config = compose(["model.layout=F S W F", *SMALL, *experts, *settings])
    held = make_overview(config, 1).ranks[0].parameters
    name = config.optim.name
    weights, gradients, optimizer = state_bytes(held, config.train.precision, 1, 1, name)
    with built_state(config, VOCAB) as state:
        parameters = [p for chunk in state.chunks for p in chunk.parameters()]
    # Sinks stay in fp32.
    sinks = sum(p.numel() for p in parameters if getattr(p, "is_sink", False))
    saved = 2 * sinks if precision == "bf16" else 0
    assert sum(p.numel() * p.element_size() for p in parameters) == weights + saved
    main_gradients = [p.main_grad for p in parameters]
    assert sum(g.numel() * g.element_size() for g in main_gradients) == gradients
    parts = [(part, ("exp_avg", "exp_avg_sq")) for part in distributed_parts(state.optimizer)]
    if optim == "muon":
        (part,) = matrix_parts(state.optimizer)
        part.init_state_fn(part.optimizer)
        parts.append((part, ("momentum_buffer",)))
        matrices = sum(matrix.numel() for matrix in part.get_parameters())
        assert matrices == held.matrices + held.experts
    found = 0
    for part, names in parts:
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                tensors = [part.optimizer.state[main][name] for name in names]
                tensors += [main] if precision == "bf16" else []
                found += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    # Main weights of fp32 sinks are the sinks themselves.
    assert found <= optimizer <= found + 4 * sinks


# 64 ranks share 96 weights of experts: some get two of them, some one.
@pytest.mark.parametrize(("dp", "least"), [(2, 0.97), (16, 0.97), (64, 0.85)])
def test_buffers_of_dealt_out_matrices_are_as_large_as_planned(dp: int, least: float) -> None:
    """The layout that megatron-core makes for Muon on `dp` data-parallel ranks."""
    sizes = ["train.precision=bf16", f"train.global_batch_size={dp}", "optim=muon"]
    config = compose(["model.layout=F S W F S W", *SMALL, *EXPERTS, *sizes])
    held = make_overview(config, dp).ranks[0].parameters
    with built_state(config, VOCAB) as state:
        (chunk,) = state.chunks
    parameters = list(chunk.parameters())
    layouts = LayerWiseDistributedOptimizer.compute_full_param_layout(
        parameters, None, dp, chunk.ddp_config, expert_data_parallel_world_size=dp
    ).layouts
    room = sum(layout.bucket_indices[-1][1] for layout in layouts.values())
    weights, gradients, _ = state_bytes(held, Precision.bf16, dp, dp, OptimizerName.muon)
    assert gradients == 2 * weights
    # Starts are padded to multiples of 64 elements, which shows in a model this small.
    assert least * room <= gradients / 4 <= room
    if dp == 64:
        assert room > 1.5 * held.total


def test_in_flight_follows_the_schedule() -> None:
    """1F1B and interleaving, replayed: forward passes done and not yet taken back."""
    for pp, vpp, count in itertools.product((1, 2, 4), (1, 2), (4, 8)):
        if vpp > 1 and pp == 1:
            continue
        config = compose(
            ["model.layout=16*F", f"parallel.pp={pp}", f"parallel.vpp={vpp if vpp > 1 else 'null'}"]
        )
        plan = plan_pipeline(config.model.layout, config.parallel.pp, config.parallel.vpp)
        for rank in range(pp):
            total = count * vpp
            warm = pp - rank - 1 if vpp == 1 else (pp - rank - 1) * 2 + (vpp - 1) * pp
            warm = min(warm, total)
            alive = most = warm
            for done in range(warm, total):
                alive += 1
                most = max(most, alive)
                alive -= 1
                assert done < total
            assert in_flight(plan, rank, count) == most / vpp


@pytest.mark.parametrize("layout", ["6*F", "F 2*S F 2*S"])
def test_context_parallel_ranks_share_the_optimizer_and_the_tokens(layout: str) -> None:
    settings = [*SMALL, f"model.layout={layout}", "train.precision=bf16", "train.recompute=full"]
    plans = {
        cp: make_overview(compose([*settings, f"parallel.cp={cp}"]), cp).ranks[0].memory
        for cp in (1, 2)
    }
    one, two = plans[1], plans[2]
    assert (two.weights, two.gradients) == (one.weights, one.gradients)
    assert two.optimizer == pytest.approx(one.optimizer / 2, rel=1e-3)
    # Full layers that nobody reads keep no keys of other ranks until the backward pass.
    inputs = "residual stream and norms"
    assert two.activations[inputs] == one.activations[inputs] / 2
    assert ("shared key and value" in two.activations) == ("S" in layout)
