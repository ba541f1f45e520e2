"""Packed documents: where each one begins, and how all are cut into pieces of one size.

`cu_seqlens` int32 [documents + 1] holds ascending offsets into the B * S tokens in row-major
order, the first 0 and the last B * S; document d is the tokens cu_seqlens[d] up to
cu_seqlens[d + 1]. Every batch row starts a document. Repeated offsets are empty documents, with
which callers may fill a tensor of fixed size up.

Everything is computed on the device of `cu_seqlens` and never waits for it: sizes that depend on
the offsets are replaced by what they can be at most.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pieces:
    """Documents cut into pieces that never reach over a border; int32, one entry per piece.

    Entries that are not used come last: empty pieces of an empty document at the end of the tokens.
    """

    first: Tensor
    """First token of each piece, ascending."""
    stop: Tensor
    """One past its last token: less than `size` tokens on where its document ends."""
    document_first: Tensor
    """First token of its document."""
    document_stop: Tensor
    """One past the last token of its document."""

    def __len__(self) -> int:
        return self.first.numel()


def cut(
    cu_seqlens: Tensor, size: int, tokens: int, first_token: int = 0, bounds: Tensor | None = None
) -> Pieces:
    """Pieces of up to `size` tokens of the tokens first_token .. first_token + tokens.

    Every document is cut from its own start, or from `first_token` if it began before. There are
    ceil(tokens / size) + documents entries, which is always enough. `bounds` are the offsets that
    the pieces name as those of their documents, where these are not `cu_seqlens` themselves.
    """
    offsets = cu_seqlens.long()
    end = first_token + tokens
    inside = offsets.clamp(first_token, end)
    documents = offsets.numel() - 1
    counts = (inside.diff() + size - 1) // size
    stops = counts.cumsum(0)
    number = torch.arange(-(-tokens // size) + documents, device=offsets.device)
    document = torch.searchsorted(stops, number, right=True)
    used = document < documents
    document = document.clamp(max=documents - 1)
    first = inside[document] + (number - (stops - counts)[document]) * size
    stop = torch.minimum(first + size, inside[document + 1])
    last: int | Tensor = end
    if bounds is not None:
        offsets, last = bounds, bounds[-1]
    fields = ((first, end), (stop, end), (offsets[document], last), (offsets[document + 1], last))
    return Pieces(*(torch.where(used, field, unused).to(torch.int32) for field, unused in fields))


def document_starts(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """int32 [tokens]: the first token of every token's document."""
    token = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return cu_seqlens[torch.searchsorted(cu_seqlens, token, right=True) - 1]


def document_starts_in_rows(cu_seqlens: Tensor, batch: int, sequence: int) -> Tensor:
    """int64 [B, S]: the same, counted within the batch row."""
    starts = document_starts(cu_seqlens, batch * sequence).view(batch, sequence).long()
    return starts - sequence * torch.arange(batch, device=starts.device).unsqueeze(1)


def blocks_in_documents(
    document_start: Tensor | None, stop: int, block_size: int, device: torch.device
) -> Tensor:
    """int64 [B or 1, stop]: the block of every token before `stop`, counted in its document.

    `document_start` [B, S] is what `document_starts_in_rows` returns; None is one document per row.
    """
    token = torch.arange(stop, device=device).unsqueeze(0)
    return (token if document_start is None else token - document_start[:, :stop]) // block_size


@dataclass(frozen=True)
class BlockTable:
    """All blocks of the keys that one KV head of one row set holds, numbered from 0.

    Without `cu_seqlens` a row set is one batch row and block i is block i of it. With them it is
    all B * S tokens, and the blocks of document 0 come before those of document 1.
    """

    first: Tensor
    """int32 [NT]: first token of each block; unused entries, which come last, are empty."""
    stop: Tensor
    """int32 [NT]: one past its last token, cut where its document (or batch row) ends."""
    document_start: Tensor | None = None
    """int32 [B * S]: first token of every token's document; None without `cu_seqlens`."""
    number: Tensor | None = None
    """int32 [B * S]: the block that every token lies in; None without `cu_seqlens`."""

    def __len__(self) -> int:
        return self.first.numel()

    @property
    def packed(self) -> bool:
        """Whether `cu_seqlens` were given."""
        return self.document_start is not None


def block_table(
    batch: int, sequence: int, block_size: int, cu_seqlens: Tensor | None, device: torch.device
) -> BlockTable:
    """The blocks of B rows of S tokens: ceil(S / block_size) dense ones, or at most
    ceil(B * S / block_size) + documents packed ones."""
    if cu_seqlens is None:
        first = torch.arange(0, sequence, block_size, dtype=torch.int32, device=device)
        return BlockTable(first, (first + block_size).clamp(max=sequence))
    tokens = batch * sequence
    pieces = cut(cu_seqlens, block_size, tokens)
    token = torch.arange(tokens, dtype=torch.int32, device=device)
    # Unused entries start at `tokens`, past every token, so that none is found in them.
    number = torch.searchsorted(pieces.first, token, right=True, out_int32=True) - 1
    return BlockTable(pieces.first, pieces.stop, document_starts(cu_seqlens, tokens), number)
