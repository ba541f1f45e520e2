"""Every layout writes, after an evaluation, what one process writes."""

import pytest

from hysparse_megatron.architecture.model import MoeConfig
from tests.distributed.cases import INSIDE, INTERLEAVED, SHORT, Case, random_tokens, reference_of
from tests.distributed.conftest import LEAST_GAP, MOST_TRIES
from tests.distributed.pool import WorkerPool
from tests.distributed.sample_jobs import NEW, draw_text, write_text

pytestmark = pytest.mark.distributed

EXPERTS = {"moe": MoeConfig(num_experts=4, num_active_experts=2, expert_ffn_hidden_size=32)}
SIZE = {"train": SHORT}
CASES = [
    Case("tp2-pp2-sp-inside", INSIDE, tp=2, pp=2, sp=True, **SIZE),
    Case("pp2-vpp2", INTERLEAVED, pp=2, vpp=2, **SIZE),
    Case("cp2", cp=2, **SIZE),
    Case("dp2-ep2", dp=2, ep=2, model=EXPERTS, **SIZE),
    Case("tp2-chunked-loss", tp=2, train={**SHORT, "loss_chunk": 8}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layout_writes_what_one_process_writes(
    case: Case, pool: WorkerPool, session_seed: int
) -> None:
    config = case.config()
    limits = {"least_gap": LEAST_GAP, "most_tries": MOST_TRIES}
    (alone,) = pool.run(1, draw_text, config=reference_of(config), seed=session_seed, **limits)
    batch = random_tokens(session_seed, sequences=config.train.global_batch_size).numpy()
    ranks = pool.run(case.world_size, write_text, config=config, prompt=alone.prompt, batch=batch)
    assert len(alone.text.split()) == NEW
    for text, before, after in ranks:
        assert text == alone.text
        assert before == after, "writing changes nothing"
