"""Fault 21: settings that cannot run. All are told at once, before any process group."""

import re

import pytest

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.validate import check
from hysparse_megatron.errors import ConfigError
from tests.run.run_commands import LOCAL, children_seconds, run

SECONDS = 3.0
"""Of a processor, so that other work on the machine does not count."""

BAD = {
    "train.stepz=3": "train.stepz",
    "train.steps=many": "train.steps",
    "train.steps=0": "train.steps",
    "train.precision=fp12": "train.precision",
    "train.guard.max_bad_steps=0": "train.guard.max_bad_steps",
    "train.guard.loss_spike=-1": "train.guard.loss_spike",
    "train.deadline_minutes=0": "train.deadline_minutes",
    "train.global_batch_size=3": "train.global_batch_size",
    "train.micro_batch_size=3": "train.global_batch_size",
    "parallel.timeout_seconds=0": "parallel.timeout_seconds",
    "parallel.tp=3": "parallel.tp",
    "parallel.pp=3": "parallel.tp",
    "parallel.cp=0": "parallel.cp",
    "model=no_such_model": "model",
    "model.backend=cuda": "model.backend",
    "model.num_attention_heads=7": "model.num_attention_heads",
    "model.layout=S F": "model.layout",
    "model.layout=F 3*X": "model.layout",
    "model.layout=2*(F S": "model.layout",
    "model.block_size=4096": "model.block_size",
    "optim.beta1=2": "optim.beta1",
    "tracking.mode=sometimes": "tracking.mode",
    "+extra.key=1": "extra.key",
}

TOGETHER = ("optim.beta1", "train.deadline_minutes", "parallel.timeout_seconds", "parallel.cp")


@pytest.mark.parametrize("override", BAD)
def test_it_is_told_by_its_key(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(compose([override]), world_size=2)
    assert caught.value.exit_code == 2
    keys = [problem.key for problem in caught.value.problems]
    assert BAD[override] in keys, keys
    for problem in caught.value.problems:
        assert problem.got
        assert problem.allowed


def test_all_of_them_at_once_in_seconds() -> None:
    told_together = [override for override in BAD if override.partition("=")[0] in TOGETHER]
    before = children_seconds()
    output = run(["--nproc", "2", *told_together], entry=LOCAL, code=2)
    assert children_seconds() - before < SECONDS
    for override in told_together:
        assert re.search(rf"{BAD[override]}: +got", output), output
    assert "joined" not in output
