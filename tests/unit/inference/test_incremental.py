"""Tokens that come in one by one, or in chunks, give what they give all at once."""

import pytest
from incremental import assert_equal, make_cache, step_by_step, without_near_ties
from megatron.core.process_groups_config import ProcessGroupCollection

from tests.unit.model.tiny_models import VOCABULARY, randomize, tiny_config, tiny_model

VARIANTS: dict[str, list[str]] = {
    "the least": ["model.layout=F S"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_by_step_is_at_once(variant: str, groups: ProcessGroupCollection, seed: int) -> None:
    config = tiny_config(*VARIANTS[variant])
    model = tiny_model(config, groups)
    randomize(model)
    model.eval()
    lengths = [29, 14]
    sequences, expected = without_near_ties(model, lengths, VOCABULARY)
    cache = make_cache(config, lengths)
    found = step_by_step(model, cache, sequences, prompts=[9, 1], chunk=4)
    assert_equal(found, expected)
