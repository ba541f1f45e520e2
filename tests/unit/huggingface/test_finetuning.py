"""Losses and gradients of an exported model are those of training."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments

from hysparse_megatron.huggingface import attention_hysparse
from hysparse_megatron.huggingface.weights import TABLES, model_weights
from tests.unit.huggingface.exports import IDS, MOE, Run, assert_logits, load, saved_run
from tests.unit.single_process import DEVICE

pytestmark = pytest.mark.usefixtures("seed", "group")


def our_gradients(run: Run, tokens: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Mean loss of the next tokens, and its gradient by names of the exported folder."""
    module = run.state.chunks[0].module
    module.train()
    module.zero_grad()
    inputs, labels = tokens[:, :-1].to(DEVICE), tokens[:, 1:].contiguous().to(DEVICE)
    loss = module(inputs, None, None, labels=labels).mean()
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    for layer in range(module.config.num_layers):
        for projection in ("fc1", "fc2"):
            begin = f"decoder.layers.{layer}.mlp.experts."
            names = [n for n in found if n.startswith(f"{begin}local_experts.") and projection in n]
            if names:
                stacked = torch.stack([found.pop(name) for name in names])
                found[f"{begin}experts.linear_{projection}.weight"] = stacked
    gradients: dict[str, Tensor] = {}
    for weight in model_weights(run.config.model, IDS):
        if weight.name in found:
            gradient = found[weight.name].cpu()
            gradients |= weight.split(gradient[:IDS] if weight.name in TABLES else gradient)
    return float(loss), gradients


# Without a bias, for whose sake megatron-core would compile a function.
EXPERTS = [*MOE, "model.moe.balancing=none"]


@pytest.mark.parametrize("recompute", [None, False, True], ids=["plain", "recompute", "reentrant"])
@pytest.mark.parametrize(
    "overrides",
    [
        ["model.layout=F S S W F S F", "model.qk_norm=true"],
        ["model.layout=F S F", "model.full_gate=head", "model.tie_embeddings=true", *EXPERTS],
    ],
    ids=["dense", "experts"],
)
def test_gradients_are_equal(
    overrides: list[str], recompute: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of key and value, which an oracle shares with its sparse layers."""
    # Chunks of few queries, as long texts have them.
    monkeypatch.setattr(attention_hysparse, "MAX_VALUES", 2000)
    with saved_run(tmp_path / "run", *overrides) as run:
        tokens = run.clear_tokens(batch=2, length=30)
        expected_loss, expected = our_gradients(run, tokens)
        model = load(run.export(tmp_path / "exported"))
    model.train()
    if recompute is not None:
        model.gradient_checkpointing_enable({"use_reentrant": recompute})
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert float(loss) == pytest.approx(expected_loss, rel=1e-6)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == expected.keys()
    for name, parameter in model.named_parameters():
        scale = float(expected[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-4, atol=2e-5 * scale, msg=name
        )


def test_bf16_is_within_noise(tmp_path: Path) -> None:
    """Of logits, compared with how far bf16 itself moves them from fp32."""
    with saved_run(tmp_path / "run", "model.layout=F S S W F", *MOE, "train.precision=bf16") as run:
        tokens = run.clear_tokens()
        expected = run.logits(tokens)
        folder = run.export(tmp_path / "exported")
        model, exact = load(folder), load(folder, dtype=torch.float32)
    assert model.dtype == torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if "sink" in n} == {torch.float32}
    with torch.no_grad():
        found, wide = model(tokens).logits.float(), exact(tokens).logits

    def distance(one: Tensor, other: Tensor) -> float:
        return float((one - other).square().mean().sqrt())

    assert distance(found, expected) < 2 * distance(expected, wide)


def test_learns_under_autocast(tmp_path: Path) -> None:
    with saved_run(tmp_path / "run", "model.layout=F S W F") as run:
        tokens = run.clear_tokens()
        model: PreTrainedModel = load(run.export(tmp_path / "exported"))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_trainer_trains_and_evaluates(tmp_path: Path) -> None:
    """Logits are gathered too, of batches of several sizes."""
    with saved_run(tmp_path / "run", "model.layout=F S W F") as run:
        tokens = run.clear_tokens(batch=5)
        model = load(run.export(tmp_path / "exported"))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    seen: list[Tensor] = []

    def keep(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(torch.tensor(prediction.predictions))
        return {}

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=2,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=1,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=keep)
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(losses) == 2
    assert losses[1] != losses[0]
    assert_logits(seen[-1], model.eval(), tokens)
