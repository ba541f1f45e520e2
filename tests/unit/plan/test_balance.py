"""How documents spread attention over context-parallel ranks, counted pair by pair."""

import numpy as np
import pytest

from hysparse_megatron.config.compose import compose
from hysparse_megatron.model.context_parallel import Shard
from hysparse_megatron.plan import balance
from hysparse_megatron.plan.overview import make_overview
from hysparse_megatron.plan.report import as_text, as_values

CP = ["parallel.cp=4", "train.seq_length=4096", "model.vocab_size=1000"]


def test_pairs_are_those_of_the_tokens_that_ranks_hold(rng) -> None:
    """Every query, against the chunks that the model gives to a rank."""
    for _ in range(20):
        cp, chunk = rng.randint(2, 5), rng.randint(1, 40)
        sequence = 2 * cp * chunk
        starts = np.array([0, *sorted(rng.sample(range(1, sequence), rng.randint(0, 3)))])
        keys = np.arange(sequence) - starts[starts.searchsorted(np.arange(sequence), "right") - 1]
        edges = np.linspace(0, sequence, 2 * cp + 1, dtype=np.int64)
        chunks = np.diff(balance._pairs_before(edges, starts))
        for rank in range(cp):
            held = Shard(rank, cp, sequence).chunks
            pairs = sum(
                (keys[c.start : c.start + c.rows.stop - c.rows.start] + 1).sum() for c in held
            )
            assert chunks[rank] + chunks[2 * cp - 1 - rank] == pairs


def test_one_document_is_even_and_short_ones_are_nearly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most uneven are documents about as long as a chunk."""
    assert balance.slowest_over_mean(4096, 4, 1e9) == 1.0
    assert balance.slowest_over_mean(4096, 4, 1) == 1.0
    ratios = [balance.slowest_over_mean(65_536, 4, length) for length in (65_536, 8_192, 64)]
    assert ratios[1] > ratios[0] > 1.0
    assert 1.0 < ratios[2] < 1.1
    monkeypatch.setattr(balance, "SEQUENCES", 2048)
    assert balance.slowest_over_mean(65_536, 4, 8_192) == pytest.approx(ratios[1], rel=0.1)


def test_a_plan_names_them_where_documents_are_masked() -> None:
    masked = make_overview(compose([*CP, "data.document_mask=true"]), 4)
    rows = as_values(masked)["context_balance"]
    assert [row["document_tokens"] for row in rows] == [1024, 128, 16]
    assert f"with documents: {rows[0]['slowest_over_mean']:.2f} of 1,024 tokens," in as_text(masked)
    for even in (["data.document_mask=false"], ["data.document_mask=true", "parallel.cp=1"]):
        overview = make_overview(compose([*CP, *even]), 4)
        assert as_values(overview)["context_balance"] == []
        assert "with documents" not in as_text(overview)
