"""Micro-batches of one data-parallel rank; those of evaluations are in held_out.py.

B is the micro-batch size, S the sequence length. No source keeps any state: a batch is asked for by
its position or number, so resuming is asking for what comes after the last one.
torch is imported where tensors are made: preparing data imports this package and needs none of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from hysparse_megatron.config.batch_ramp import BatchRamp
from hysparse_megatron.config.skips import Skips
from hysparse_megatron.data.read.dataset import Samples
from hysparse_megatron.data.read.order import Position

if TYPE_CHECKING:
    import torch


NO_SKIPS = Skips()


class RankShare:
    """Which places of a global batch one data-parallel rank works on.

    Item i of micro-batch m on rank r has place (m * data_parallel_size + r) * B + i: a global batch
    is cut into micro-batches, and these are dealt to the ranks in turn. So the samples of a global
    batch, and the order of the micro-batches, do not depend on the number of ranks.
    """

    def __init__(
        self,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_size: int = 1,
        data_parallel_rank: int = 0,
    ) -> None:
        if min(global_batch_size, micro_batch_size, data_parallel_size) < 1:
            raise ValueError("batch sizes and data_parallel_size must be at least 1")
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(
                f"data_parallel_rank {data_parallel_rank} is outside 0 .. {data_parallel_size - 1}"
            )
        if global_batch_size % (micro_batch_size * data_parallel_size):
            raise ValueError(
                f"global_batch_size {global_batch_size} is not divisible by micro_batch_size "
                f"{micro_batch_size} x data_parallel_size {data_parallel_size}"
            )
        self.num_microbatches = global_batch_size // (micro_batch_size * data_parallel_size)
        places = np.arange(global_batch_size).reshape(
            self.num_microbatches, data_parallel_size, micro_batch_size
        )
        self.places = places[:, data_parallel_rank]  # [num_microbatches, B]

    def microbatches(
        self, samples: Samples, batch_ids: np.ndarray, document_mask: bool
    ) -> Iterator[dict[str, torch.Tensor]]:
        """This rank's share of a global batch of these samples, one for each row of `places`."""
        for places in self.places:
            batch = _to_tensors(samples.read(batch_ids[places]))
            if document_mask:
                separate_documents(batch, [samples.document_starts(i) for i in batch_ids[places]])
            yield batch


class BatchSource:
    """Training batches of one data-parallel rank.

    Args:
        samples: the training split.
        seed, fingerprint: fix the order, see order.py.
        global_batch_size, micro_batch_size: in samples.
        data_parallel_size, data_parallel_rank: of this process; only choose its share.
        ramp: how the global batch grows; None: it has one size.
        document_mask: whether batches say where documents start.
        skips: steps whose samples are left out.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        seed: int,
        fingerprint: str,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_size: int = 1,
        data_parallel_rank: int = 0,
        ramp: BatchRamp | None = None,
        document_mask: bool = False,
        skips: Skips = NO_SKIPS,
    ) -> None:
        self._samples = samples
        self._skips = skips
        self._document_mask = document_mask
        self._seed = seed
        self._fingerprint = fingerprint
        self._global_batch_size = global_batch_size
        self._ramp = ramp
        self._shares = {
            size: RankShare(size, micro_batch_size, data_parallel_size, data_parallel_rank)
            for size in (ramp.sizes(global_batch_size) if ramp else [global_batch_size])
        }

    def _size(self, position: Position) -> int:
        if self._ramp is None:
            return self._global_batch_size
        return self._ramp.size_at(position.place, self._global_batch_size)

    def _begin(self, position: Position) -> Position:
        """`position` after the steps that are left out there."""
        end = self._skips.end(position.steps)
        left_out = self._samples_of(end - position.steps, position.place)
        return dataclasses.replace(position, left_out=position.left_out + left_out, steps=end)

    def _samples_of(self, steps: int, place: int) -> int:
        """How many samples of the order so many steps take from `place` on."""
        if self._ramp is None:
            return steps * self._global_batch_size
        return self._ramp.samples_of(steps, place, self._global_batch_size)

    def after(self, position: Position) -> Position:
        """Where a run stands after the step at `position`."""
        begin = self._begin(position)
        return dataclasses.replace(
            begin, samples=begin.samples + self._size(begin), steps=begin.steps + 1
        )

    def sample_ids(self, position: Position) -> np.ndarray:
        """Ids of all samples of the global batch at `position`, on all ranks: int64 [its size]."""
        begin = self._begin(position)
        return self._samples.sample_ids(
            np.arange(begin.place, begin.place + self._size(begin)),
            seed=self._seed,
            fingerprint=self._fingerprint,
        )

    def microbatches(self, position: Position) -> Iterator[dict[str, torch.Tensor]]:
        """This rank's micro-batches of the step at `position`, on the CPU.

        Each holds `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32), [B, S].
        With `document_mask` also `cu_seqlens`, int32 [documents + 1]: where each begins in B x S
        tokens, and their end; no loss where a label is the first token of another document.

        Raises:
            DataError: a token id outside the vocabulary.
        """
        ids = self.sample_ids(position)
        return self._shares[len(ids)].microbatches(self._samples, ids, self._document_mask)


def _to_tensors(tokens: np.ndarray) -> dict[str, torch.Tensor]:
    """Inputs and next-token labels of samples [B, S + 1]."""
    import torch

    rows = torch.from_numpy(tokens)
    inputs, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    return {
        "tokens": inputs,
        "labels": labels,
        "loss_mask": torch.ones(inputs.shape, dtype=torch.float32),
        "position_ids": torch.arange(inputs.shape[1]).expand_as(inputs).contiguous(),
    }


def separate_documents(batch: dict[str, torch.Tensor], starts: list[np.ndarray]) -> None:
    """Add `cu_seqlens` to a batch of B rows, and take labels of other documents out of the loss.

    `starts` has, for each row, the places 0 .. S at which a document starts.
    """
    import torch

    rows, length = batch["tokens"].shape
    begins = []
    for row, places in enumerate(starts):
        # What is predicted at the place before is the first token of a document not yet seen.
        batch["loss_mask"][row, torch.from_numpy(places[places > 0]) - 1] = 0.0
        inside = places[(places > 0) & (places < length)]
        begins.append(row * length + np.concatenate(([0], inside)))
    offsets = np.concatenate((*begins, [rows * length])).astype(np.int32)
    batch["cu_seqlens"] = torch.from_numpy(offsets)
