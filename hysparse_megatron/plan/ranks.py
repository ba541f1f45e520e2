"""How many processes a run has, by its settings alone."""

from __future__ import annotations

import math

from hysparse_megatron.config.cluster import Scheduler
from hysparse_megatron.config.schema import Config


def num_ranks(config: Config) -> int:
    """Processes that the run will have, by its cluster and parallel sizes."""
    cluster, parallel = config.cluster, config.parallel
    if cluster.scheduler is Scheduler.local:
        # Experts lie on tensor- and data-parallel ranks of a stage.
        fewest = parallel.pp * math.lcm(parallel.tp * parallel.cp, parallel.ep)
        return cluster.ranks_per_node or max(1, fewest)
    return cluster.nodes * ranks_per_node(config)


def ranks_per_node(config: Config) -> int:
    """Processes on one node of a Slurm job."""
    return config.cluster.ranks_per_node or config.cluster.gpus_per_node
