"""Block selections to time with: clustered, random, captured from a model; and their numbers.

Shapes: B batch, HKV KV groups, S sequence, K selected.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hysparse_kernels import neighbour_agreement
from hysparse_kernels.benchmarking.problem import Problem


def synthetic(problem: Problem, device: torch.device, clustered: bool) -> Tensor:
    """int32 [B, HKV, S, K]: ascending, without duplicates, -1 padding last.

    Random: drawn per token among the visible blocks. Clustered, as real selections are: block 0,
    the own block and the one before, the rest drawn once per block of tokens with 5 % noise.
    """
    batch_groups = problem.batch * problem.groups
    sequence, selected, blocks = problem.sequence, problem.num_selected, problem.num_blocks
    own = torch.arange(sequence, device=device) // problem.block_size
    drawn = torch.rand(batch_groups, sequence, selected, device=device)
    if clustered:
        shared = torch.rand(batch_groups, blocks, selected, device=device)[:, own]
        drawn = torch.where(torch.rand_like(drawn) < 0.05, drawn, shared)
    ids = (drawn * (own[None, :, None] + 1)).long()
    if clustered:
        for slot, fixed in enumerate((torch.zeros_like(own), own, (own - 1).clamp(min=0))):
            if slot < selected:
                ids[..., slot] = fixed
    ids = ids.sort(-1).values
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[..., 1:] = ids[..., 1:] == ids[..., :-1]
    ids = ids.masked_fill(repeated, blocks).sort(-1).values
    ids = ids.masked_fill(ids == blocks, -1).to(torch.int32)
    return ids.view(problem.batch, problem.groups, sequence, selected)


def visible_pairs(indices: Tensor, problem: Problem) -> float:
    """(query head, key) pairs that the selection lets through: keys after the query do not count.

    Needs indices without duplicates, as an oracle makes them.
    """
    total = 0
    token = torch.arange(problem.sequence, device=indices.device)[:, None]
    for group in indices.flatten(0, 1):  # one at a time: long sequences select much
        reach = token - group * problem.block_size + 1
        seen = torch.where(group >= 0, reach.clamp(0, problem.block_size), 0)
        total += int(seen.sum())
    return float(total * problem.heads_per_group)


def mean_union(indices: Tensor, tokens: int) -> float:
    """Mean number of different blocks that a tile of `tokens` neighbouring tokens selects.

    The last tile counts only if it is whole.
    """
    batch, groups, sequence, selected = indices.shape
    tiles = sequence // tokens
    if not tiles:
        return float("nan")
    selected_blocks = indices[:, :, : tiles * tokens].reshape(
        batch * groups, tiles, tokens * selected
    )
    selected_blocks = selected_blocks.sort(-1).values
    new = torch.ones_like(selected_blocks, dtype=torch.bool)
    new[..., 1:] = selected_blocks[..., 1:] != selected_blocks[..., :-1]
    return float((new & (selected_blocks >= 0)).sum() / (batch * groups * tiles))


def hottest_share(indices: Tensor) -> float:
    """Share of the tokens that read the most read block, mean over batch and groups."""
    shares = []
    for group in indices.flatten(0, 1):
        counts = group[group >= 0].long().bincount()
        shares.append(float(counts.max()) / group.shape[0] if counts.numel() else 0.0)
    return sum(shares) / len(shares)


def statistics(indices: Tensor) -> dict[str, float]:
    """What decides how fast a selection can be read, of int32 [B, HKV, S, K]."""
    return {
        "neighbour_agreement": float(neighbour_agreement(indices)),
        **{f"mean_union_of_{tokens}": mean_union(indices, tokens) for tokens in (4, 8, 16)},
        "hottest_block_share": hottest_share(indices),
    }


def describe(numbers: dict[str, float]) -> str:
    """`statistics` in words."""
    unions = ", ".join(f"{numbers[f'mean_union_of_{tokens}']:.1f}" for tokens in (4, 8, 16))
    return (
        f"neighbours agree on {numbers['neighbour_agreement']:.0%}; mean union of 4, 8, 16 tokens"
        f" {unions} blocks; the hottest block is read by {numbers['hottest_block_share']:.0%} of"
        " the tokens"
    )


@dataclass(frozen=True)
class Captured:
    """What the oracles of a trained model select on one text; see `hysparse capture-selections`."""

    facts: dict[str, Any]
    """How it came about: model, steps, loss, block_size, num_selected, sequence and so on."""
    layers: dict[int, Tensor]
    """Oracle layer (from 0) -> int32 [HKV, S, K]."""

    def save(self, path: Path) -> None:
        """One compressed file; ids are stored as differences between tokens, which shrink well."""
        arrays: dict[str, Any] = {"facts": np.array(json.dumps(self.facts))}
        for layer, indices in self.layers.items():
            steps = indices.clone()
            steps[:, 1:] -= indices[:, :-1]
            arrays[f"layer_{layer}"] = steps.to(torch.int16).numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> Captured:
        """The inverse of `save`. OSError or ValueError if it is no such file."""
        with np.load(path, allow_pickle=False) as file:
            if "facts" not in file:
                raise ValueError(f"{path}: not a captured selection, it has no facts")
            facts = json.loads(str(file["facts"]))
            layers = {
                int(name.removeprefix("layer_")): torch.from_numpy(file[name].astype(np.int32))
                .cumsum(1)
                .to(torch.int32)
                for name in file.files
                if name.startswith("layer_")
            }
        return cls(facts, layers)

    def for_groups(self, layer: int, groups: int, device: torch.device) -> Tensor:
        """int32 [1, groups, S, K] of one layer; its groups are repeated or cut to fit."""
        indices = self.layers[layer]
        chosen = torch.arange(groups) % indices.shape[0]
        return indices[chosen].contiguous()[None].to(device)
