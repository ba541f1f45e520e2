"""The configuration with which a run generates."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hysparse_megatron.architecture.model import Fp8
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.frozen import freeze
from hysparse_megatron.config.schema import Recompute
from hysparse_megatron.errors import ConfigError, DataError
from hysparse_megatron.inference.generate import Settings, generate
from hysparse_megatron.inference.load import inference_config

EXPERTS = ["model.moe.num_experts=6", "model.moe.num_active_experts=2"]
TRAINED = [
    "model=tiny_hysparse",
    "model.layout=F 2*S | S F",
    "model.fp8=tensorwise",
    "train.recompute=selective",
    "parallel.tp=4",
    "parallel.pp=2",
    "parallel.sequence_parallel=true",
]


def frozen(run_dir: Path, *overrides: str) -> Path:
    freeze(compose([*TRAINED, *overrides]), run_dir)
    return run_dir


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_ranks_are_tensor_ranks(ranks: int, tmp_path: Path) -> None:
    config = inference_config(frozen(tmp_path), ranks)
    parallel = config.parallel
    assert (parallel.tp, parallel.pp, parallel.vpp, parallel.ep) == (ranks, 1, None, 1)
    assert not parallel.sequence_parallel
    assert config.model.layout == "FSSSF"
    assert config.model.fp8 is Fp8.none
    assert config.train.recompute is Recompute.none


def test_experts_are_spread_if_they_can_be(tmp_path: Path) -> None:
    frozen(tmp_path, *EXPERTS, "parallel.ep=2")
    assert inference_config(tmp_path, 2).parallel.ep == 2
    assert inference_config(tmp_path, 4).parallel.ep == 1


@pytest.mark.parametrize(
    "trained",
    [
        ["parallel.cp=2", "parallel.cp_keep_kv=false"],
        ["parallel.vpp=2", "parallel.overlap.param_gather=false", "train.micro_batch_size=1"],
        ["parallel.num_distributed_optimizer_instances=3", "parallel.timeout_seconds=77"],
        ["optim=muon", *EXPERTS, "parallel.ep=2"],
        ["train.recompute_modules=[norm]", "train.global_batch_size=8"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("ranks", [1, 4])
def test_how_a_run_was_trained_refuses_no_rank_of_generation(
    trained: list[str], ranks: int, tmp_path: Path
) -> None:
    parallel = inference_config(frozen(tmp_path, *trained), ranks).parallel
    assert (parallel.tp, parallel.cp, parallel.cp_keep_kv) == (ranks, 1, True)


def test_what_a_run_computed_with_is_no_condition(tmp_path: Path) -> None:
    """A run of a GPU generates on a CPU; what runs anywhere stays as it was asked for."""
    for asked, found in (("triton te", "auto auto"), ("reference local", "reference local")):
        backend, layers = asked.split()
        run_dir = frozen(tmp_path, f"model.backend={backend}", f"model.layers={layers}")
        model = inference_config(run_dir, 1).model
        assert f"{model.backend.value} {model.layers.value}" == found


def test_a_split_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"heads: got 4; +allowed a multiple of parallel.tp = 3"):
        inference_config(frozen(tmp_path), 3)
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*nowhere"):
        inference_config(tmp_path / "nowhere", 1)


def test_a_prompt_of_ids_that_the_model_lacks_is_refused() -> None:
    """Of a tokenizer with tokens added beyond the model's rows."""
    model: Any = SimpleNamespace(vocab_size=257)
    with pytest.raises(DataError, match="token id 257, but the model has 257 ids"):
        generate(model, [[1, 2], [3, 257]], Settings(1))
