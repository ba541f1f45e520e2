"""Which samples an evaluation reads: the same for training and for every tool.

They are spread over the whole split, and are all of it where it holds no more than asked for. The
last batch is filled up with samples that do not count. So the batch sizes and the number of ranks
say how the samples are computed, not which ones they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from hysparse_megatron.data.read.batches import RankShare
from hysparse_megatron.data.read.dataset import Samples

if TYPE_CHECKING:
    import torch


class EvaluationBatches:
    """Batches of one evaluation for one data-parallel rank: the same at every evaluation.

    Same interface as `BatchSource`, with the number of a batch, 0 .. num_batches - 1, in place of
    the step.

    Args:
        samples: the split.
        num_samples: how many to read; all where there are no more.
        global_batch_size, micro_batch_size: in samples.
        data_parallel_size, data_parallel_rank: of this process; only choose its share.
        document_mask: whether batches say where documents start.

    Attributes:
        num_samples: read by all ranks together, each once.
        num_batches: the last one may be filled up.
        num_microbatches: per batch on this rank.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        num_samples: int,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_size: int = 1,
        data_parallel_rank: int = 0,
        document_mask: bool = False,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        self._samples = samples
        self._document_mask = document_mask
        self._global_batch_size = global_batch_size
        self._share = RankShare(
            global_batch_size, micro_batch_size, data_parallel_size, data_parallel_rank
        )
        self._ids = samples.held_out_ids(num_samples)
        self.num_samples = len(self._ids)
        self.num_batches = -(-self.num_samples // global_batch_size)
        self.num_microbatches = self._share.num_microbatches

    def sample_ids(self, batch: int) -> np.ndarray:
        """Ids of all samples of the batch, on all ranks: int64 [global_batch_size].

        The last one goes on with the first samples, which do not count again.
        """
        if not 0 <= batch < self.num_batches:
            raise IndexError(f"evaluation batch {batch} is outside 0 .. {self.num_batches - 1}")
        first = batch * self._global_batch_size
        places = np.arange(first, first + self._global_batch_size)
        found: np.ndarray = self._ids.take(places, mode="wrap")
        return found

    def microbatches(self, batch: int) -> Iterator[dict[str, torch.Tensor]]:
        """This rank's micro-batches of one batch, as `BatchSource.microbatches`.

        `loss_mask` is 0 in rows that only fill up the last batch.
        """
        left = self.num_samples - batch * self._global_batch_size
        made = self._share.microbatches(self._samples, self.sample_ids(batch), self._document_mask)
        for places, microbatch in zip(self._share.places, made, strict=True):
            microbatch["loss_mask"][places >= left] = 0.0
            yield microbatch
