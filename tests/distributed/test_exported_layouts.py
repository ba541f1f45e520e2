"""What is exported does not depend on the ranks that saved it."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from hysparse_megatron.architecture.model import Balancing, MoeConfig, RouterScore
from hysparse_megatron.config.frozen import freeze
from tests.distributed.cases import INSIDE, Case, reference_of
from tests.distributed.checkpoint_jobs import save_initial
from tests.distributed.pool import WorkerPool
from tools.convert import main

pytestmark = pytest.mark.distributed

EXPERTS = {
    "moe": MoeConfig(
        num_experts=4,
        num_active_experts=2,
        expert_ffn_hidden_size=24,
        shared_expert_ffn_hidden_size=16,
        router_score=RouterScore.sigmoid,
        balancing=Balancing.bias,
    )
}


@pytest.mark.parametrize(
    "case",
    [
        Case("tp2-pp2", INSIDE, tp=2, pp=2),
        Case("tp2-pp2-ep2-sp", INSIDE, tp=2, pp=2, ep=2, sp=True, model=EXPERTS),
    ],
    ids=lambda case: case.name,
)
def test_files_are_those_of_one_process(case: Case, pool: WorkerPool, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a")).save(str(tokenizer))
    folders = []
    for name, config in (("many", case.config()), ("one", reference_of(case.config()))):
        ranks = case.world_size if name == "many" else 1
        pool.run(ranks, save_initial, config=config, run_dir=tmp_path / name)
        freeze(config, tmp_path / name)
        folders.append(tmp_path / f"{name}-exported")
        arguments = ["--run-dir", str(tmp_path / name), "--tokenizer", str(tokenizer)]
        arguments += ["--shard-size", "50KB", str(folders[-1])]
        assert main(["export", *arguments]) == 0
    many, one = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert many == one
    assert len([name for name in many if name.endswith(".safetensors")]) > 1
