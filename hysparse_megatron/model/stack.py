"""The decoder of one pipeline stage: layers of three kinds, and what they share.

`HybridModel` builds it from a `ModuleSpec` and treats it as its own hybrid stack.
Shapes: S sequence, B batch, C channels, T tensor-parallel size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.stages import live_oracle
from hysparse_megatron.model.attend import Attend, TrainingAttend, recomputed
from hysparse_megatron.model.context_parallel import Shard
from hysparse_megatron.model.megatron_config import HySparseConfig
from hysparse_megatron.model.offload import ON_DEVICE, Keep
from hysparse_megatron.model.regather import Regather
from hysparse_megatron.model.rotary import cosines_and_sines
from hysparse_megatron.model.sharing import Shared, SharedAttention, pack, unpack
from hysparse_megatron.runtime.process_groups import RunGroups

EXTRA_STATE = "_extra_state"
"""In the names of what Transformer Engine's layers would store beside their weights."""


@dataclass
class HySparseStackSubmodules:
    """Specs of the layers by kind and by whether they have experts, and the norm after the last."""

    layers: Mapping[tuple[LayerKind, bool], ModuleSpec]
    final_norm: type


class HySparseStack(MegatronModule):
    """The layers of one pipeline stage."""

    def __init__(
        self,
        config: HySparseConfig,
        submodules: HySparseStackSubmodules,
        layer_type_list: list[str],
        pp_layer_offset: int,
        pg_collection: RunGroups,
        pre_process: bool = True,
        post_process: bool = True,
        dtype: torch.dtype | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.config: HySparseConfig = config
        self.pre_process = pre_process
        self.post_process = post_process
        self.groups = pg_collection
        self.attend: Callable[..., Attend] = TrainingAttend
        """What makes the `Attend` of a forward pass; `attending_with` sets another."""
        self.input_tensor: Tensor | None = None
        plan = config.plan
        self.layer_indices = range(pp_layer_offset, pp_layer_offset + len(layer_type_list))
        self.stage = plan.stages.index(self.layer_indices)

        self.layers = torch.nn.ModuleList()
        for index in self.layer_indices:
            kind = plan.layout.kinds[index]
            self.layers.append(
                build_module(
                    submodules.layers[kind, config.is_moe_layer(index)],
                    config=config,
                    layer_number=index + 1,
                    pg_collection=pg_collection,
                    add_layer_offset=False,
                    pp_layer_offset=pp_layer_offset,
                )
            )
        if post_process:
            self.final_norm = submodules.final_norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )

    def set_input_tensor(self, input_tensor: Tensor) -> None:
        """Take what the previous stage sent; called by megatron-core's schedules."""
        self.input_tensor = input_tensor

    def forward(
        self,
        hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        attend: Attend | None = None,
        **unused: object,
    ) -> Tensor:
        """[S / T or S, B, C] -> the same after this stage's layers, or the payload of a cut.

        A stage that is cut off inside a hybrid block takes and returns the hidden state packed
        with key, value and indices: see `sharing.pack`. `attention_mask` must be None: attention
        is causal by construction. `packed_seq_params` says where documents start: its
        `cu_seqlens_q`, int32 [documents + 1], counts in the B * S tokens row by row. `attend` of a
        step of generation replaces that of training. With context parallelism S of the hidden
        state is that of this rank's tokens, and of `rotary_pos_emb` and the documents all.
        """
        if attention_mask is not None or any(value is not None for value in unused.values()):
            given = [name for name, value in unused.items() if value is not None]
            raise ValueError(
                f"HySparse layers are causal and take no masks; got {given or 'a mask'}"
            )
        documents = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q
        hidden = cast(Tensor, hidden_states if self.pre_process else self.input_tensor)
        self.input_tensor = None
        if rotary_pos_emb is not None:
            rotary_pos_emb = self._shard(rotary_pos_emb.shape[0]).take(rotary_pos_emb)
            if not self.config.apply_rope_fusion:
                scale = self.config.architecture.rope_scaling.attention_scale
                rotary_pos_emb = cosines_and_sines(rotary_pos_emb, scale)
        with self._keeping(hidden, rotary_pos_emb) as keep:
            hidden, shared = self._through_layers(hidden, rotary_pos_emb, documents, attend, keep)
        if self.post_process:
            return cast(torch.nn.Module, self.final_norm)(hidden)
        return self._sent(hidden, shared)

    def _keeping(self, given: Tensor, rotary: Tensor | None) -> AbstractContextManager[Keep]:
        """How layers keep what they save in a forward pass of `given`."""
        offload = self.config.offload
        if offload is None or not (self.training and torch.is_grad_enabled()):
            return contextlib.nullcontext(ON_DEVICE)
        stay = [*self.layers.parameters(), *self.layers.buffers()]
        if rotary is not None:
            stay.append(rotary)
        if not self.pre_process:
            stay.append(given)  # which the schedule holds
        return offload.forward_pass(given.device, stay)

    def _through_layers(
        self,
        hidden: Tensor,
        rotary_pos_emb: Tensor | None,
        documents: Tensor | None,
        attend: Attend | None,
        keep: Keep,
    ) -> tuple[Tensor, Shared | None]:
        """The hidden state after the last layer, and what is shared with layers of later stages."""
        plan = self.config.plan
        regather = Regather(keeps_all=self.config.cp_keep_kv, keep=keep)
        if attend is None:
            attend = self._training_attend(documents, regather)
        shared: Shared | None = None
        if plan.oracle_into(self.stage) is not None:
            hidden, received = unpack(hidden, self.config.shared_widths())
            shared = attend.prepared(received)
        # With sequence parallelism every tensor-parallel rank drops out other tokens.
        with (
            tensor_parallel.get_cuda_rng_tracker().fork()
            if self.config.sequence_parallel
            else contextlib.nullcontext()
        ):
            for index, layer in zip(self.layer_indices, self.layers, strict=True):
                # The backward pass that comes first begins with the last layer of the model.
                first = self.post_process and index == self.layer_indices[-1]
                with contextlib.nullcontext() if first else keep.layer():
                    hidden, shared = self._run(
                        layer, hidden, shared, rotary_pos_emb, documents, attend, regather
                    )
                if live_oracle(plan.layout, index + 1) is None:
                    shared = None  # free key and value with their last reader
                    regather.forget()
                elif plan.layout.kinds[index].is_oracle:
                    shared = attend.prepared(cast(Shared, shared))
        regather.forget()
        return hidden, shared

    def _sent(self, hidden: Tensor, shared: Shared | None) -> Tensor:
        """What crosses the cut after this stage."""
        if self.config.plan.oracle_out_of(self.stage) is not None:
            assert isinstance(shared, SharedAttention), (
                "a cut inside a hybrid block has nothing to send"
            )
            shard = self._shard(shared.key.shape[0])
            key, value = shard.take(shared.key), shard.take(shared.value)
            return pack(hidden, shared._replace(key=key, value=value))
        # The schedules free what they have sent, which a view of another tensor would survive.
        return make_viewless_tensor(inp=hidden, requires_grad=hidden.requires_grad, keep_graph=True)

    def _shard(self, sequence: int) -> Shard:
        """What this rank holds of sequences of `sequence` tokens."""
        return Shard.of(self.groups.cp, sequence)

    def _training_attend(
        self, documents: Tensor | None, regather: Regather, again: bool = False
    ) -> Attend:
        return self.attend(
            config=self.config,
            groups=self.groups,
            documents=documents,
            training=self.training,
            again=again,
            regather=regather,
        )

    def _run(
        self,
        layer: torch.nn.Module,
        hidden_states: Tensor,
        shared: Shared | None,
        rotary_pos_emb: Tensor | None,
        documents: Tensor | None,
        attend: Attend,
        regather: Regather,
    ) -> tuple[Tensor, Shared | None]:
        """One layer, recomputed in the backward pass if it is one of those that are.

        What is shared enters and leaves the recomputed function as tensors, never by other ways,
        or the oracle's key and value would silently lose the gradient of their readers.
        """
        place = cast(TransformerLayer, layer).layer_number - 1 - self.layer_indices.start
        if not (self.training and self.config.recomputes_layer(place)):
            with get_fp8_context(self.config, cast(TransformerLayer, layer).layer_number - 1):
                return layer(hidden_states, shared, rotary_pos_emb, attend)

        shared = cast(SharedAttention | None, shared)
        lists = shared.lists if shared else (None,)

        def run(again: bool, hidden: Tensor, rotary: Tensor | None, *parts: Tensor | None):
            given = None
            if parts[0] is not None:
                given = SharedAttention(*cast(tuple[Tensor, Tensor, Tensor], parts), lists)
            attend = self._training_attend(documents, Regather() if again else regather, again)
            hidden, made = layer(hidden, given, rotary, attend)
            if made is None or made is given:
                # What the layer only passes on stays outside of the recomputed function.
                return hidden
            return hidden, *made.tensors

        with regather.saving():
            outputs = recomputed(
                run, hidden_states, rotary_pos_emb, *(shared.tensors if shared else [None] * 3)
            )
        if isinstance(outputs, Tensor):
            return outputs, shared
        return outputs[0], SharedAttention(*outputs[1:])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """Keys hold the global layer index and no rank, so any layout can load them."""
        result: dict = {}
        for local, (index, layer) in enumerate(zip(self.layer_indices, self.layers, strict=True)):
            local_prefix = f"{prefix}layers.{local}."
            sharded = cast(MegatronModule, layer).sharded_state_dict(local_prefix, (), metadata)
            replace_prefix_for_sharding(sharded, local_prefix, f"{prefix}layers.{index}.")
            result.update(sharded)
        if self.post_process:
            norm = (self.final_norm, f"{prefix}final_norm.", sharded_offsets, metadata)
            result.update(sharded_state_dict_default(*norm, tp_group=self.groups.tp))
        # Transformer Engine's layers keep scales there, of which ours have none from step to step.
        return {key: value for key, value in result.items() if EXTRA_STATE not in key}


@contextlib.contextmanager
def attending_with(
    chunks: Iterable[torch.nn.Module], make: Callable[..., Attend]
) -> Iterator[None]:
    """Within, the layers of these model chunks attend with what `make` returns.

    `make` takes the fields of a `TrainingAttend`: to measure what layers do, or to change it.
    """
    stacks = [
        module
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(module, HySparseStack)
    ]
    former = [stack.attend for stack in stacks]
    for stack in stacks:
        stack.attend = make
    try:
        yield
    finally:
        for stack, attend in zip(stacks, former, strict=True):
            stack.attend = attend


def documents_of(batch: Mapping[str, Tensor], length: int) -> PackedSeqParams | None:
    """Where the documents of a batch start, as `HySparseStack.forward` takes it.

    `length`: tokens of a sequence, on all context-parallel ranks together.
    """
    offsets = batch.get("cu_seqlens")
    if offsets is None:
        return None
    # Rotation only knows distances, so that every row is rotated as a whole.
    return PackedSeqParams(
        qkv_format="sbhd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=length,
        max_seqlen_kv=length,
    )
