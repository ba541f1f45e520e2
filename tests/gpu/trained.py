"""Settings of runs that GPUs train in seconds."""

from tests.run.run_commands import TINY

STEPS = 10
MODEL = [
    *TINY,
    "model.layout=F S S F S W",
    "model.hidden_size=128",
    "model.ffn_hidden_size=192",
    "model.num_attention_heads=8",
    "model.num_query_groups=2",
    "model.head_dim=64",
    "model.block_size=64",
    "model.num_selected_blocks=2",
    "model.window=64",
    "train.seq_length=512",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    f"train.steps={STEPS}",
    "checkpoint.interval=5",
    "optim.schedule=constant",  # so that a run may be ended early and be made longer
    "optim.decay_steps=null",
]
EXPERTS = ["model.moe.num_experts=4", "model.moe.num_active_experts=2"]
PRECISIONS = {
    "fp32": ["model.backend=reference", "model.layers=local"],  # the others multiply in TF32
    "bf16": ["model.backend=triton", "model.layers=auto"],
}
