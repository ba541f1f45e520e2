"""What `debug.deterministic` sets, and what it refuses."""

from collections.abc import Iterator

import pytest
import torch
from megatron.training.determinism import (
    ACCEPTED_ENV_VAR_VALUES,
    ACCEPTED_NCCL_ALGO_TOKENS,
    DETERMINISM_ENV_VAR_DEFAULTS,
)

from hysparse_megatron.config.compose import compose
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.model.layers import LayerChoice, fusions
from hysparse_megatron.model.megatron_config import make_megatron_config
from hysparse_megatron.runtime import determinism


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = (cudnn.benchmark, cudnn.deterministic)
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.benchmark, cudnn.deterministic = before


def test_all_switches_are_set() -> None:
    torch.backends.cudnn.benchmark = True
    environment: dict[str, str] = {"NCCL_DEBUG": "WARN", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    told = determinism.enforce(environment)
    assert "NCCL_ALGO=Ring" in told
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert environment == {
        "NCCL_DEBUG": "WARN",
        "CUBLAS_WORKSPACE_CONFIG": ":16:8",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "NCCL_ALGO": "Ring",
    }


def test_megatron_takes_what_is_set() -> None:
    environment: dict[str, str] = {}
    determinism.enforce(environment)
    assert environment == DETERMINISM_ENV_VAR_DEFAULTS
    for name, values in determinism.VARIABLES.items():
        assert set(values) <= ACCEPTED_ENV_VAR_VALUES.get(name, ACCEPTED_NCCL_ALGO_TOKENS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_ALGO", "Tree"),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"),
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0"),
    ],
)
def test_an_environment_that_allows_any_order_is_refused(name: str, value: str) -> None:
    environment = {name: value}
    with pytest.raises(ConfigError, match=f"debug.deterministic: true, but {name}={value} "):
        determinism.enforce(environment)
    assert environment == {name: value}
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_model_is_told() -> None:
    """Also that its loss on a GPU is one that repeats."""
    engine = LayerChoice(True, "", on_cuda=True)
    for value in (False, True):
        config = compose([f"debug.deterministic={value}"])
        assert make_megatron_config(config).deterministic_mode is value
        loss = fusions(engine, config.model, value)["cross_entropy_fusion_impl"]
        assert loss == ("native" if value else "te")
