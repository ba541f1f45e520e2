"""Transformer Engine's layers against megatron-core's own: weights, names, losses, gradients.

Without a GPU and Transformer Engine every test here is skipped.
"""

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import Config, ParallelConfig
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.model.builder import build_chunks
from hysparse_megatron.model.layers import LayerChoice, resolve_layers
from hysparse_megatron.model.megatron_config import make_megatron_config
from hysparse_megatron.runtime import device as runtime_device
from hysparse_megatron.runtime.launcher import Rank
from hysparse_megatron.runtime.process_groups import build_process_groups, destroy_process_groups
from hysparse_megatron.runtime.random import seed_step

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="needs transformer-engine"
)
VOCABULARY, SEQUENCE = 128, 96
SIZES = [
    "model.layout=F S W S",
    "model.hidden_size=256",
    "model.ffn_hidden_size=192",
    "model.num_attention_heads=16",
    "model.num_query_groups=4",
    "model.head_dim=64",
    "model.block_size=64",
    "model.num_selected_blocks=1",
    "model.window=32",
    "model.init_std=0.1",
    f"train.seq_length={SEQUENCE}",
    "train.micro_batch_size=2",
]
EXPERTS = [
    "model.moe.num_experts=8",
    "model.moe.num_active_experts=2",
    "model.moe.expert_ffn_hidden_size=128",
    "model.moe.num_dense_first_layers=1",
]


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroupCollection]:
    runtime_device.start(Rank(0, 1, 0, 1), ParallelConfig(timeout_seconds=60))
    config = compose([*SIZES])
    found = build_process_groups(config.parallel, 4)
    seed_step(0, 0, found)
    yield found
    destroy_process_groups()


def build(config: Config, groups: ProcessGroupCollection) -> tuple[HybridModel, LayerChoice]:
    layers = resolve_layers(config.model, torch.device("cuda"))
    megatron = make_megatron_config(config, layers)
    (model,) = build_chunks(config, megatron, VOCABULARY, groups, layers)
    return model.to("cuda"), layers


def stored(model: HybridModel, groups: ProcessGroupCollection) -> dict[str, Tensor]:
    """What a checkpoint would hold, by its names there."""
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": groups.dp_cp}
    found = {}
    for sharded in model.sharded_state_dict(metadata=metadata).values():
        parts = sharded.build() if hasattr(sharded, "build") else sharded
        for part in parts if isinstance(parts, list) else [parts]:
            if getattr(part, "data", None) is not None and torch.is_tensor(part.data):
                found[f"{part.key} {part.global_offset}"] = part.data
    return found


def losses_and_gradients(model: HybridModel) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE + 1), generator=generator).cuda()
    position = torch.arange(SEQUENCE, device="cuda").expand(2, -1)
    losses = model(tokens[:, :-1].contiguous(), position, None, labels=tokens[:, 1:].contiguous())
    losses.float().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses.detach().float(), gradients


@pytest.mark.parametrize("experts", [[], EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_kinds_are_one_model(
    experts: list[str], precision: str, groups: ProcessGroupCollection
) -> None:
    backend = "triton" if precision == "bf16" else "reference"
    common = [*SIZES, *experts, f"train.precision={precision}", f"model.backend={backend}"]
    models = {}
    for kind in ("local", "te"):
        models[kind], layers = build(compose([*common, f"model.layers={kind}"]), groups)
        assert layers.name == kind
    weights = {kind: stored(model, groups) for kind, model in models.items()}
    assert weights["te"].keys() == weights["local"].keys()
    for name, weight in weights["local"].items():
        assert torch.equal(weight, weights["te"][name]), name

    (losses, gradients), (te_losses, te_gradients) = (
        losses_and_gradients(model) for model in models.values()
    )
    # Transformer Engine multiplies fp32 matrices in TF32.
    limit = 2e-2 if precision == "bf16" else 1e-2
    assert (losses - te_losses).norm() / losses.norm() < limit
    total = torch.stack([g.double().norm() for g in gradients.values()]).norm()
    te_total = torch.stack([g.double().norm() for g in te_gradients.values()]).norm()
    assert abs(total - te_total) / total < limit
    assert len(te_gradients) > len(models["te"].decoder.layers) * 3


@pytest.mark.parametrize("fp8", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("experts", [[], EXPERTS], ids=["dense", "experts"])
def test_fp8_follows_bf16(experts: list[str], fp8: str, groups: ProcessGroupCollection) -> None:
    common = [*SIZES, *experts, "train.precision=bf16", "model.layers=te"]
    wanted, _ = losses_and_gradients(build(compose(common), groups)[0])
    losses, gradients = losses_and_gradients(
        build(compose([*common, f"model.fp8={fp8}"]), groups)[0]
    )
    off = (losses - wanted).norm() / wanted.norm()
    assert 1e-6 < off < 0.1, "FP8 does not show, or is far off"
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_auto_takes_transformer_engine() -> None:
    choice = resolve_layers(compose(SIZES).model, torch.device("cuda"))
    assert choice.transformer_engine
    assert "Transformer Engine" in choice.reason
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        resolve_layers(compose([*SIZES, "model.layers=te"]).model, torch.device("cpu"))
