"""Who receives what in which order, and what a cut costs."""

import pytest
from tiny_models import tiny_config, tiny_megatron_config

from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.architecture.stages import PipelinePlan, stage_layers
from hysparse_megatron.model.pipeline import describe_traffic, receive_order


def plan_of(pp: int, chunks: int) -> PipelinePlan:
    layout = parse_layout(f"F {2 * pp * chunks}*S F")
    return PipelinePlan(layout, stage_layers(layout, pp * chunks), pp)


def executed(pp: int, chunks: int, microbatches: int, group: int, rank: int) -> list[list[int]]:
    """The stages whose forward, and whose backward, `rank` runs, in order.

    Interleaving takes `group` micro-batches through its first chunk, then the same through its
    second, and so on, before the next `group`; backward likewise from the last chunk.
    """
    forward: list[int] = []
    backward: list[int] = []
    for start in range(0, microbatches, group):
        size = min(group, microbatches - start)
        for chunk in range(chunks):
            forward += [chunk * pp + rank] * size
        for chunk in reversed(range(chunks)):
            backward += [chunk * pp + rank] * size
    return [forward, backward]


@pytest.mark.parametrize("microbatches", [1, 2, 3, 4, 7, 8, 12])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_ranks_receive_what_their_neighbours_send(pp: int, chunks: int, microbatches: int) -> None:
    groups = [pp] if chunks == 1 else sorted({pp, pp + 1, 2 * pp})
    plan = plan_of(pp, chunks)
    stages = pp * chunks
    for group in groups:
        for rank in range(pp):
            previous, _ = executed(pp, chunks, microbatches, group, (rank - 1) % pp)
            _, following = executed(pp, chunks, microbatches, group, (rank + 1) % pp)
            sent_forward = [stage + 1 for stage in previous if stage + 1 < stages]
            sent_backward = [stage - 1 for stage in following if stage > 0]
            forward, backward = receive_order(plan, rank, microbatches, group)
            assert forward == sent_forward, f"pp rank {rank}, group {group}"
            assert backward == sent_backward, f"pp rank {rank}, group {group}"
            assert all(stage % pp == rank for stage in forward + backward)
            # Every stage but the first gets an input, every one but the last a gradient, for
            # each micro-batch.
            mine = {stage for stage in range(stages) if stage % pp == rank}
            assert {s: forward.count(s) for s in set(forward)} == dict.fromkeys(
                mine - {0}, microbatches
            )
            assert {s: backward.count(s) for s in set(backward)} == dict.fromkeys(
                mine - {stages - 1}, microbatches
            )


def test_without_interleaving_no_group_size_is_needed() -> None:
    assert receive_order(plan_of(2, 1), 0, 3, None) == ([], [0, 0, 0])
    assert receive_order(plan_of(2, 1), 1, 3, None) == ([1, 1, 1], [])


@pytest.mark.parametrize(("pp", "vpp"), [(2, None), (4, None), (2, 2), (3, 2), (4, 2)])
def test_interleaved_stages_send_while_they_compute(pp: int, vpp: int | None) -> None:
    layers = f"model.layout=F {pp * (vpp or 1)}*S"
    sizes = [f"parallel.pp={pp}", f"parallel.vpp={'null' if vpp is None else vpp}"]
    found = tiny_megatron_config(tiny_config(layers, *sizes))
    assert (found.overlap_p2p_comm, found.batch_p2p_comm) == (vpp is not None, vpp is None)


@pytest.mark.parametrize(
    ("precision", "element_bytes", "index_columns"), [("fp32", 4, 12), ("bf16", 2, 12)]
)
def test_traffic_by_hand(precision: str, element_bytes: int, index_columns: int) -> None:
    config = tiny_config(
        "model.layout=F S | S F | S S",
        "model.hidden_size=32",
        "model.num_query_groups=4",
        "model.head_dim=8",
        "model.value_head_dim=4",
        "model.num_selected_blocks=3",
        "train.seq_length=64",
        "parallel.pp=3",
        f"train.precision={precision}",
    )
    # 4 groups of a key of 8, a value of 4 and 3 indices, each one element wide, for every token.
    shared = 4 * 8 + 4 * 4 + index_columns
    tokens = 64 * 2
    hidden = tokens * 32 * element_bytes
    extra = tokens * shared * element_bytes
    lines = describe_traffic(tiny_megatron_config(config), rows=64, batch=2).splitlines()
    assert lines == [
        f"cut before layer {layer}: {hidden + extra:,} bytes per micro-batch and direction from "
        f"each rank (hidden state {hidden:,}, key, value, indices of oracle {oracle} {extra:,})"
        for layer, oracle in ((2, 0), (4, 3))
    ]


def test_traffic_of_a_cut_between_blocks_and_with_sequence_parallelism() -> None:
    config = tiny_config(
        "model.layout=F S | F S | S F",
        "model.hidden_size=32",
        "model.num_query_groups=2",
        "train.seq_length=64",
        "parallel.pp=3",
        "parallel.tp=2",
        "parallel.sequence_parallel=true",
    )
    between, inside = describe_traffic(tiny_megatron_config(config), rows=32, batch=1).splitlines()
    assert between == (
        "cut before layer 2: 4,096 bytes per micro-batch and direction from each rank "
        "(hidden state only)"
    )
    # One group on each of two ranks: key 8, value 8, 2 indices, for all 64 tokens.
    extra = 64 * (8 + 8 + 2) * 4
    assert inside.endswith(f"(hidden state 4,096, key, value, indices of oracle 2 {extra:,})")
    assert f" {4096 + extra:,} bytes " in inside
