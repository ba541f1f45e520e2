"""HySparse layers in a training loop of plain megatron-core, without this project's own.

    torchrun --nproc-per-node 4 examples/plain_megatron.py

Groups, model, schedule, data parallelism and optimizer are megatron-core's. From here come the
transformer configuration with the layout, the spec of the decoder, and the communicator that knows
how wide what crosses a pipeline cut inside a hybrid block is. What else a loop has to offer is in
docs/extending.md.
"""

import torch
import torch.distributed as dist
from megatron.core import distributed, parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from hysparse_megatron.architecture.model import ModelConfig
from hysparse_megatron.config.schema import Config, ParallelConfig, TrainConfig
from hysparse_megatron.model.initialization import draw_weights
from hysparse_megatron.model.layers import resolve_layers
from hysparse_megatron.model.megatron_config import make_megatron_config
from hysparse_megatron.model.pipeline import PayloadCommunicator
from hysparse_megatron.model.spec import hysparse_stack_spec
from hysparse_megatron.runtime import megatron_on_cpu
from hysparse_megatron.runtime.process_groups import RunGroups

VOCAB, SEQUENCE, BATCH, MICRO_BATCHES = 256, 64, 2, 4
MODEL = ModelConfig(
    # The cut stands inside a hybrid block: key, value and selection cross it.
    layout="F S | 2*S F", hidden_size=64, ffn_hidden_size=128, num_attention_heads=4,
    num_query_groups=2, head_dim=16, block_size=8, num_selected_blocks=2, window=8,
)  # fmt: skip
TRAIN = TrainConfig(steps=5, global_batch_size=8, micro_batch_size=BATCH, seq_length=SEQUENCE)
CONFIG = Config(model=MODEL, train=TRAIN, parallel=ParallelConfig(tp=2, pp=2))


def tokens_of(step: int) -> list[Tensor]:
    """Micro-batches of token ids [B, S + 1]: bytes that go up and down, to be learnt quickly."""
    start = torch.arange(MICRO_BATCHES * BATCH).unsqueeze(1) * 17 + step
    ids = 128 + 100 * torch.sin((start + torch.arange(SEQUENCE + 1)) / 5)
    return list(ids.long().split(BATCH))


def forward_step(batches, model):
    """What megatron-core's schedules call for every micro-batch."""
    tokens = next(batches).to(torch.cuda.current_device())
    losses = model(tokens[:, :-1], None, None, labels=tokens[:, 1:])

    def loss(per_token: Tensor):
        count = torch.tensor(per_token.numel(), dtype=torch.int, device=per_token.device)
        return per_token.sum(), count, per_token.detach().mean()

    return losses, loss


def main() -> None:
    """Train a few steps and print their losses on the last rank."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    megatron_on_cpu.install()  # does nothing where there is a GPU
    parallel_state.initialize_model_parallel(CONFIG.parallel.tp, CONFIG.parallel.pp)
    groups = RunGroups.use_mpu_process_groups()
    layers = resolve_layers(MODEL, torch.device(torch.cuda.current_device()))
    config = make_megatron_config(CONFIG, layers)
    config.finalize_model_grads_func = distributed.finalize_model_grads
    model = HybridModel(
        config, hysparse_stack_spec(layers), VOCAB, SEQUENCE, config.plan.megatron_pattern,
        pre_process=groups.pp.rank() == 0, post_process=groups.pp.rank() == groups.pp.size() - 1,
        position_embedding_type="rope", pg_collection=groups,
        share_embeddings_and_output_weights=MODEL.tie_embeddings,
    )  # fmt: skip
    draw_weights(model, config, groups)
    ddp_config = distributed.DistributedDataParallelConfig(use_distributed_optimizer=True)
    chunk = distributed.DistributedDataParallel(config, ddp_config, model)
    adam = OptimizerConfig(lr=1e-3, weight_decay=0.0, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(adam, [chunk])
    communicator = PayloadCommunicator(groups.pp, config, rows=SEQUENCE, batch=BATCH)
    for step in range(TRAIN.steps):
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        communicator.begin(MICRO_BATCHES)
        losses = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter(tokens_of(step)), model=chunk,
            num_microbatches=MICRO_BATCHES, seq_length=SEQUENCE, micro_batch_size=BATCH,
            forward_only=False, p2p_communicator=communicator, pg_collection=groups,
        )  # fmt: skip
        optimizer.step()
        if dist.get_rank() == dist.get_world_size() - 1:
            print(f"step {step + 1} loss {sum(losses).item() / MICRO_BATCHES:.9f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
