"""Every parallel layout trains like one process: losses, grad norms, gradients and selections."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hysparse_megatron.architecture.layers import FullGate, GateKind, SinkKind
from hysparse_megatron.architecture.model import Balancing, RouterScore
from hysparse_megatron.config.schema import MuonTensorParallel, Recompute, RecomputeModule
from tests.distributed.cases import (
    DENSE_FIRST,
    FEW,
    INSIDE,
    INTERLEAVED,
    MUON,
    SHORT,
    SHORT_FULL,
    STEPS,
    TIED,
    TWO_INSIDE,
    Case,
    experts,
)
from tests.distributed.comparison import (
    GRAD_NORM_TOLERANCE,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    ReferenceFor,
    compare,
    gradient_steps,
)
from tests.distributed.pool import WorkerPool
from tests.distributed.ranks import RankRun, train
from tests.distributed.table import ROW

pytestmark = pytest.mark.distributed

ON_BORDER = "F 2*S | F 3*S F"
HYBRID = "F S W S F W F"
HYBRID_INTERLEAVED = "F S | W S | F W | F"

SHORT_SELECTIVE = {**SHORT, "recompute": Recompute.selective}
SHORT_PARTS = {
    **SHORT_SELECTIVE,
    "recompute_modules": [RecomputeModule.norm, RecomputeModule.feed_forward],
}
SHORT_EXPERTS = {
    **SHORT_SELECTIVE,
    "recompute_modules": [
        RecomputeModule.attention,
        RecomputeModule.norm,
        RecomputeModule.experts,
    ],
}
SHORT_SOME = {**SHORT_FULL, "recompute_layers": 2}
"""Of the stages INSIDE, an oracle with one of its readers, and two readers of what was sent."""
MQA = {"num_query_groups": 1}
WIDE = {"gate": GateKind.channel, "value_head_dim": 12}
FORCED = {"num_selected_blocks": 3, "forced_first_blocks": 1, "forced_recent_blocks": 1}

IN_CHUNKS = {**SHORT, "loss_chunk": 7}
"""The logits of 7 tokens at a time, of which no sequence is a multiple."""
UNEVEN = {"block_size": 5}
"""Blocks that no chunk of a sequence is a multiple of."""
GATED = {"full_gate": FullGate.head}
QKV_BIAS = {"qkv_bias": True}
ALL_PARTS = {**QKV_BIAS, **WIDE, "qk_norm": True, "full_gate": FullGate.channel}
"""All that a projection and what follows it may have, in every kind of layer."""
PADDED = {"vocab_size": 130}
"""Two ids in the second half of 256 rows: at TP 4 one rank holds nothing but padding."""
DISTRIBUTED = MuonTensorParallel.distributed


def muon(**settings: Any) -> dict[str, Any]:
    """The usual Muon but for `settings`."""
    return {**MUON, "muon": replace(MUON["muon"], **settings)}


SOFTMAX = experts(balancing=Balancing.sequence_aux_loss, z_loss_coefficient=0.01)
SHARED = experts(shared_expert_ffn_hidden_size=16, balancing=Balancing.aux_loss)
BIASED = experts(
    router_score=RouterScore.sigmoid,
    router_scaling=2.5,
    balancing=Balancing.bias,
    bias_update_rate=0.01,
)

CASES = [
    Case("tp2", tp=2, train=SHORT),
    Case("tp2-sp", tp=2, sp=True, train=SHORT),
    Case("tp4-4groups", tp=4, model={"num_query_groups": 4}, train=SHORT),
    Case("bias-tp4-sp-2groups", tp=4, sp=True, model={**QKV_BIAS, **PADDED}, train=IN_CHUNKS),
    Case("tp2-mqa", tp=2, model=MQA, train=IN_CHUNKS),
    Case("all-parts-tp4-sp-mqa", HYBRID, tp=4, sp=True, model={**ALL_PARTS, **MQA}, train=SHORT),
    Case("recompute-full-tp2-dp2-sp-mqa", tp=2, dp=2, sp=True, model=MQA, train=SHORT_FULL),
    Case("tp2-pp2-sp-mqa-inside", INSIDE, tp=2, pp=2, sp=True, model=MQA, train=SHORT),
    Case("pp2-border", ON_BORDER, pp=2, train=SHORT),
    Case("pp2-inside", INSIDE, pp=2, train=FEW),
    Case("pp4-two-inside", TWO_INSIDE, pp=4, train=FEW),
    Case("pp2-vpp2-inside", INTERLEAVED, pp=2, vpp=2, train=FEW),
    Case("pp4-vpp2", pp=4, vpp=2, train=FEW),
    Case("tp2-pp2-sp-inside", INSIDE, tp=2, pp=2, sp=True),
    Case("tp2-pp2-vpp2-sp", INTERLEAVED, tp=2, pp=2, vpp=2, sp=True, train=SHORT),
    Case("dp2", dp=2),
    Case("dp2-pp2-inside", INSIDE, dp=2, pp=2, train=FEW),
    Case("dp4-2-instances", dp=4, instances=2, train=FEW),
    Case("cp2-tp2-sp-2-instances", cp=2, tp=2, sp=True, instances=2, train=SHORT),
    Case("moe-dp4-ep2-2-instances", dp=4, ep=2, instances=2, model=SOFTMAX, train=FEW),
    Case("tp2-dp2-sp", tp=2, dp=2, sp=True, train=SHORT),
    Case("recompute-full", train=SHORT_FULL),
    Case("recompute-selective", train=SHORT_SELECTIVE),
    Case("recompute-full-tp2-pp2-sp-inside", INSIDE, tp=2, pp=2, sp=True, train=SHORT_FULL),
    Case("recompute-parts-tp2-pp2-sp", INSIDE, tp=2, pp=2, sp=True, train=SHORT_PARTS),
    Case("recompute-some-tp2-pp2-sp", INSIDE, tp=2, pp=2, sp=True, train=SHORT_SOME),
    Case("recompute-selective-tp2-pp2-sp", INSIDE, tp=2, pp=2, sp=True, train=SHORT_SELECTIVE),
    Case("tied-pp2", INSIDE, pp=2, model={**TIED, **PADDED}, train=IN_CHUNKS),
    Case("qk-norm-tp2-sp", tp=2, sp=True, model={"qk_norm": True}, train=SHORT),
    Case("channel-gate-wide-value-tp2-pp2", INSIDE, tp=2, pp=2, model=WIDE, train=SHORT),
    Case("shared-sink-tp2", tp=2, model={"sink": SinkKind.shared}, train=SHORT),
    Case("forced-blocks-tp2-pp2-inside", INSIDE, tp=2, pp=2, model=FORCED, train=SHORT),
    Case("hybrid-tp2-sp", HYBRID, tp=2, sp=True, train=SHORT),
    Case("hybrid-pp2-vpp2", HYBRID_INTERLEAVED, pp=2, vpp=2, train=SHORT),
    Case("full-gate-tp2-sp", tp=2, sp=True, model=GATED, train=SHORT),
    Case("moe-tp2-sp-ep2", tp=2, sp=True, ep=2, model=SOFTMAX, train=SHORT),
    Case("moe-pp2-ep2-inside", INSIDE, pp=2, dp=2, ep=2, model=SOFTMAX, train=SHORT),
    Case("moe-shared-tp2-dp2-ep2", tp=2, sp=True, dp=2, ep=2, model=SHARED, train=SHORT),
    Case("moe-bias-tp2-dp2-ep4", tp=2, sp=True, dp=2, ep=4, model=BIASED, train=SHORT),
    Case("moe-dense-first-pp2-vpp2-ep2", INTERLEAVED, pp=2, vpp=2, dp=2, ep=2, **DENSE_FIRST),
    Case("moe-recompute-parts-tp2-ep2", tp=2, sp=True, ep=2, model=SOFTMAX, train=SHORT_EXPERTS),
    Case("moe-recompute-full-tp2-ep2", tp=2, sp=True, ep=2, model=SOFTMAX, train=SHORT_FULL),
    Case("documents-tp2-pp2-sp", INSIDE, tp=2, pp=2, sp=True, train=SHORT_FULL, documents=True),
    Case("documents-tp2-mqa", tp=2, model=MQA, train=SHORT_SELECTIVE, documents=True),
    Case("documents-pp2-vpp2", HYBRID_INTERLEAVED, pp=2, vpp=2, train=SHORT, documents=True),
    Case("documents-moe-dp2-ep2", dp=2, ep=2, model=SOFTMAX, train=SHORT, documents=True),
    Case("cp2", cp=2, train=SHORT),
    Case("cp4", cp=4, train=IN_CHUNKS),
    Case("cp2-documents-uneven-blocks", cp=2, model=UNEVEN, train=SHORT, documents=True),
    Case("cp2-pp2-inside-recompute-selective", INSIDE, cp=2, pp=2, train=SHORT_SELECTIVE),
    Case("cp2-pp2-vpp2", INTERLEAVED, cp=2, pp=2, vpp=2, train=SHORT),
    Case("cp2-tp2-sp-mqa", cp=2, tp=2, sp=True, model=MQA, train=SHORT),
    Case("cp2-hybrid-recompute-full-documents", HYBRID, cp=2, train=SHORT_FULL, documents=True),
    Case("cp3-all-full", "3*F", cp=3, train={**SHORT, "seq_length": 36}),
    Case("cp2-moe-shared-tp2-sp-ep4", cp=2, tp=2, sp=True, ep=4, model=SHARED, train=SHORT),
    Case("muon-dp2", dp=2, train=SHORT, optim=MUON),
    Case("muon-bias-tp2-sp", tp=2, sp=True, model=QKV_BIAS, train=SHORT, optim=MUON),
    Case("muon-tp2-distributed", tp=2, train=SHORT, optim=muon(tp_mode=DISTRIBUTED)),
    Case("muon-tied-pp2-dp2", INSIDE, pp=2, dp=2, model=TIED, train=SHORT, optim=MUON),
    Case("muon-whole-projections-tp4", tp=4, train=SHORT, optim=muon(split_qkv=False)),
    Case("muon-tp4-sp-mqa", tp=4, sp=True, model={**WIDE, **MQA}, train=SHORT, optim=MUON),
    Case("muon-moe-tp2-sp-ep2", tp=2, sp=True, ep=2, model=SHARED, train=SHORT, optim=MUON),
    Case("muon-moe-dp2-ep2", dp=2, ep=2, model=SHARED, train=SHORT, optim=MUON),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_trains_like_one_process(
    case: Case,
    pool: WorkerPool,
    reference_for: ReferenceFor,
    record_property: Callable[[str, object], None],
) -> None:
    config = case.config()
    reference = reference_for(config)
    runs = pool.run(
        case.world_size,
        train,
        config=config,
        tokens=reference.tokens,
        gradient_steps=gradient_steps(len(reference.tokens)),
    )
    differences = compare(reference, runs, config.model.num_query_groups, case.sp)
    record_property(ROW, tuple(differences.row(case.name, case.world_size, reference)))
    assert differences.too_large() == []


def test_slices_of_matrices_are_other_matrices(
    pool: WorkerPool, reference_for: ReferenceFor
) -> None:
    """Muon's blockwise mode trains another way at every size, and the comparison says so."""
    blockwise = muon(tp_mode=MuonTensorParallel.blockwise)
    config = Case("blockwise", tp=2, train=SHORT, optim=blockwise).config()
    reference = reference_for(config)
    compared = gradient_steps(len(reference.tokens))
    runs = pool.run(2, train, config=config, tokens=reference.tokens, gradient_steps=compared)
    assert runs[0].losses[0] == pytest.approx(reference.losses[0], abs=LOSS_TOLERANCE)
    differences = compare(reference, runs, config.model.num_query_groups)
    assert max(differences.gradients.values()) > 10 * GRADIENT_TOLERANCE


def test_reference_is_worth_comparing_with(reference_for: ReferenceFor) -> None:
    """Every parameter has a gradient, and different tokens select different blocks.

    Whether training gets anywhere is not asked here: the tokens are random.
    """
    reference = reference_for(Case("base").config())
    for step in gradient_steps(STEPS):
        for name, piece in reference.gradients[step].items():
            assert np.abs(piece.value).max() > 0, f"{name} got no gradient"
    selected = np.concatenate([step[0].reshape(-1, 2) for step in reference.selections])
    late = np.unique(selected[selected[:, 1] >= 0], axis=0)
    assert len(late) > 20, "almost always the same blocks are selected"


def test_differences_are_noticed(reference_for: ReferenceFor) -> None:
    """The comparison is no rubber stamp: anything a little off is found, and nothing else."""
    reference = reference_for(Case("base").config())
    name = "decoder.layers.3.self_attention.linear_qkv.linear.weight"

    def problems(spoil: Callable[[RankRun], None]) -> list[str]:
        run = copy.deepcopy(reference)
        spoil(run)
        return [problem.split(":")[0] for problem in compare(reference, [run], 2).too_large()]

    def spoil_loss(run: RankRun) -> None:
        run.losses[7] += 2 * LOSS_TOLERANCE

    def spoil_grad_norm(run: RankRun) -> None:
        run.grad_norms[7] *= 1 + 3 * GRADIENT_TOLERANCE

    def spoil_all_grad_norms(run: RankRun) -> None:
        run.grad_norms[:] = [norm * (1 + 3 * GRAD_NORM_TOLERANCE) for norm in run.grad_norms]

    def spoil_gradient(run: RankRun) -> None:
        gradient = run.gradients[STEPS - 1][name].value
        gradient *= 1 + 2 * GRADIENT_TOLERANCE

    def spoil_selection(run: RankRun) -> None:
        chosen = run.selections[5][3][0, 0, 1, 9]
        chosen[:] = [0, 2] if list(chosen) == [0, 1] else [0, 1]

    def select_twice(run: RankRun) -> None:
        run.selections[5][3] = np.repeat(run.selections[5][3], 2, axis=0)

    assert problems(lambda run: None) == []
    assert problems(spoil_loss) == ["loss"]
    assert problems(spoil_grad_norm) == ["grad norm"]
    assert problems(spoil_all_grad_norms) == ["median grad norm"]
    assert problems(spoil_gradient) == [f"gradient of {name} in step {STEPS - 1}"]
    assert problems(spoil_selection) == ["selection"]
    assert problems(select_twice) == ["selection"]
