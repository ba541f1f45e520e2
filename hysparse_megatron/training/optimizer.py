"""megatron-core's distributed optimizer and learning-rate schedule, from our configuration."""

from __future__ import annotations

import functools

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    distrib_optimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from hysparse_megatron.checkpoint.moments import distributed_parts, parts_of
from hysparse_megatron.config.schema import (
    OptimConfig,
    OptimizerName,
    Precision,
    Schedule,
    TrainConfig,
)
from hysparse_megatron.training import muon

_MEGATRON_STYLE = {Schedule.wsd: "WSD", Schedule.cosine: "cosine", Schedule.constant: "constant"}


def build_optimizer(
    optim: OptimConfig, precision: Precision, chunks: list[DistributedDataParallel]
) -> MegatronOptimizer:
    """AdamW, or Muon with AdamW, on fp32 main parameters; state split over data-parallel ranks."""
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    with_muon = optim.name is OptimizerName.muon
    megatron = OptimizerConfig(
        optimizer="muon" if with_muon else "adam",
        lr=optim.learning_rate,
        min_lr=optim.min_learning_rate,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.epsilon,
        clip_grad=optim.clip_grad,
        # The layer-wise optimizer cannot be stepped without; it takes fp32 weights as well.
        bf16=dtype is torch.bfloat16 or with_muon,
        params_dtype=dtype,
        use_distributed_optimizer=not with_muon,
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        use_layer_wise_distributed_optimizer=with_muon,
        **muon.megatron_settings(optim.muon),  # type: ignore[arg-type]
    )
    if with_muon:
        muon.mark_projections(chunks)
    # The fp32 sinks of a bf16 model need a group of their own: the distributed optimizer loses
    # count of its parameters, and cannot save them, where one group holds two precisions.
    overrides = get_standard_config_overrides(megatron)
    overrides[ParamKey(attr="is_sink")] = ParamGroupOverride(wd_mult=0.0, start_wd=0.0, end_wd=0.0)
    optimizer = get_megatron_optimizer(
        megatron,
        chunks,  # type: ignore[arg-type]
        config_overrides=overrides,
    )
    if with_muon:
        muon.allow_checkpoints_in_fp32(optimizer)
    for part in distributed_parts(optimizer):
        if not distrib_optimizer.HAVE_APEX_OR_TE:
            _allow_checkpoints_of_torch_adam(part)
    return optimizer


@torch.no_grad()
def update(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """What `optimizer.step()` does once gradients are prepared and their norm is known.

    It would prepare them again and reduce a second norm over all ranks, to clip by.
    """
    for part in parts_of(optimizer):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()


_ADAM = {
    "transformer_engine": "AdamW of Transformer Engine (FusedAdam)",
    "apex": "AdamW of apex (FusedAdam)",
    "torch": "AdamW of torch",
}
"""By package; megatron-core takes the first that it can import."""


def adam_name(optimizer: MegatronOptimizer) -> str:
    """Which implementation of AdamW runs inside `optimizer`."""
    kind = type(distributed_parts(optimizer)[0].optimizer)
    return _ADAM.get(kind.__module__.split(".")[0], f"AdamW of {kind.__module__}")


def _allow_checkpoints_of_torch_adam(part: DistributedOptimizer) -> None:
    """Make the distributed optimizer save and load with PyTorch's AdamW.

    It was written for the fused optimizers of apex and Transformer Engine, which keep the step
    count in the parameter groups. PyTorch's keeps a `step` tensor beside the moments, and only
    after the first step: give the state from the start, and supply `step` where it is looked up.
    """
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            part.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    original = part._set_main_param_and_optimizer_states

    @functools.wraps(original)
    def with_step(model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        main_param = part.optimizer.param_groups[group]["params"][order]
        state = part.optimizer.state[main_param]
        # megatron-core gives all parameters one tensor, which each of them would count up.
        state["step"] = state["step"].clone()
        original(model_param, {**tensors, "step": state["step"]})

    part._set_main_param_and_optimizer_states = with_step


def build_schedule(
    optim: OptimConfig, train: TrainConfig, optimizer: MegatronOptimizer
) -> OptimizerParamScheduler:
    """The learning rate by step; `set_step` makes it a pure function of the step."""
    warmup = optim.warmup_steps
    decay = optim.num_decay_steps(train.steps)
    decay_end = warmup + decay if optim.schedule is Schedule.cosine else train.steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.learning_rate,
        min_lr=optim.min_learning_rate,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(decay_end, warmup + 1),
        lr_decay_style=_MEGATRON_STYLE[optim.schedule],
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=train.steps,
        wd_incr_style="constant",
        wsd_decay_steps=decay if optim.schedule is Schedule.wsd else None,
        lr_wsd_decay_style="linear",
    )


def set_step(schedule: OptimizerParamScheduler, step: int) -> None:
    """Set the learning rate of the update that makes step number `step` (from 0).

    The schedule is evaluated at step + 1, so that the first update of a warm-up is not zero.
    """
    schedule.num_steps = step + 1
    schedule.step(increment=0)
