"""The model chunks of this rank: megatron-core's model around our stack."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection

from hysparse_megatron.architecture.parameters import padded_vocab_size
from hysparse_megatron.config.schema import Config
from hysparse_megatron.model.initialization import draw_weights
from hysparse_megatron.model.language_model import LanguageModel
from hysparse_megatron.model.layers import LOCAL, LayerChoice
from hysparse_megatron.model.megatron_config import HySparseConfig
from hysparse_megatron.model.rotary import rotary_frequencies
from hysparse_megatron.model.spec import hysparse_stack_spec


def build_chunks(
    config: Config,
    megatron: HySparseConfig,
    vocab_size: int,
    groups: ProcessGroupCollection,
    layers: LayerChoice = LOCAL,
    draw: bool = True,
) -> list[LanguageModel]:
    """The model chunks of this pipeline rank, in order (one without interleaving).

    Initial weights depend on `config.train.seed` alone, not on the parallel layout. Without `draw`
    they are any, for those who load them.
    """
    spec = hysparse_stack_spec(layers)
    plan = megatron.plan
    last = len(plan.stages) - 1
    chunks: list[LanguageModel] = []
    for chunk in range(plan.num_chunks):
        stage = plan.stage_index(groups.pp.rank(), chunk)
        model = LanguageModel(
            num_ids=vocab_size,
            loss_chunk=config.train.loss_chunk,
            config=megatron,
            hybrid_stack_spec=spec,
            vocab_size=padded_vocab_size(vocab_size),
            max_sequence_length=config.train.seq_length,
            hybrid_layer_pattern=plan.megatron_pattern,
            pre_process=stage == 0,
            post_process=stage == last,
            share_embeddings_and_output_weights=config.model.tie_embeddings,
            position_embedding_type="rope",
            pg_collection=groups,
            vp_stage=chunk if plan.num_chunks > 1 else None,
        )
        model.rotary_pos_emb.inv_freq = rotary_frequencies(config.model)
        # The stack takes this rank's positions itself: megatron-core pins memory for it.
        model.rotary_pos_emb.cp_group = None
        if draw:
            draw_weights(model, megatron, groups)
        model.clear_padding()
        chunks.append(model)
    return chunks
