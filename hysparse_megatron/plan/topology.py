"""Which layers stand on which pipeline stage, and what each cut sends.

The same plan is made on every rank from the configuration alone, so no rank ever has to be told
the shape of what it receives.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from hysparse_megatron.config.schema import ModelConfig, ParallelConfig
from hysparse_megatron.layout import Layout, live_oracle, parse_layout, stage_layers


@dataclass(frozen=True)
class PipelinePlan:
    """The layers of every pipeline stage, in model order.

    Stage `chunk * pp + rank` runs on pipeline rank `rank` as its model chunk `chunk`.
    """

    layout: Layout
    stages: tuple[range, ...]
    pp: int

    @property
    def num_chunks(self) -> int:
        """Model chunks per pipeline rank (1 without interleaving)."""
        return len(self.stages) // self.pp

    def stage_index(self, pp_rank: int, chunk: int) -> int:
        """Model-order index of the stage that is chunk `chunk` of pipeline rank `pp_rank`."""
        return chunk * self.pp + pp_rank

    def oracle_into(self, stage: int) -> int | None:
        """The oracle whose key, value and indices enter `stage` from the stage before it."""
        if stage == 0:
            return None
        return live_oracle(self.layout, self.stages[stage].start)

    def oracle_out_of(self, stage: int) -> int | None:
        """The oracle whose key, value and indices leave `stage` for the next one."""
        return None if stage + 1 == len(self.stages) else self.oracle_into(stage + 1)

    def is_read(self, layer: int) -> bool:
        """Whether any sparse layer reads the oracle at `layer`."""
        return layer in self._oracles_read

    @cached_property
    def _oracles_read(self) -> frozenset[int | None]:
        return frozenset(plan.oracle for plan in self.layout.layers)

    @property
    def megatron_pattern(self) -> str:
        """The stages in megatron-core's hybrid pattern: `*` for each layer, `|` for each cut."""
        return "|".join("*" * len(stage) for stage in self.stages)

    def describe(self) -> str:
        """One line per stage: where it runs, its layers, what enters it."""
        lines = []
        for index, stage in enumerate(self.stages):
            kinds = "".join(self.layout.layers[layer].kind.value for layer in stage)
            oracle = self.oracle_into(index)
            enters = "" if oracle is None else f", reads on from oracle {oracle} across the cut"
            lines.append(
                f"stage {index} (pp rank {index % self.pp}, chunk {index // self.pp}): "
                f"layers {stage.start}-{stage.stop - 1} {kinds}{enters}"
            )
        return "\n".join(lines)


def plan_pipeline(model: ModelConfig, parallel: ParallelConfig) -> PipelinePlan:
    """Cut the model's layers into pp * vpp stages. Raises `LayoutError`."""
    return _plan(model.layout, parallel.pp, parallel.vpp or 1)


@lru_cache(maxsize=256)
def _plan(layout_text: str, pp: int, vpp: int) -> PipelinePlan:
    """Kept, because a search over plans asks for the same cuts again and again."""
    layout = parse_layout(layout_text)
    return PipelinePlan(layout, stage_layers(layout, pp * vpp), pp)
