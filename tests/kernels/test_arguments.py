"""Wrong arguments are refused with what, got and expected; backends say why."""

from typing import Any

import pytest
import torch
from hysparse_kernels import (
    BackendUnavailable,
    block_sparse_attention,
    block_topk,
    oracle_attention,
    resolve_backend,
    sliding_window_attention,
)


def shaped(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def offsets(*tokens: int) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int32)


GOOD: dict[str, Any] = {
    "query": shaped(2, 6, 4, 8),
    "key": shaped(2, 6, 2, 8),
    "value": shaped(2, 6, 2, 3),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": shaped(2, 6, 8)}, r"query: got shape \[2, 6, 8\]"),
        ({"query": shaped(2, 0, 4, 8)}, "query: got shape"),
        ({"query": shaped(2, 6, 3, 8)}, "got 3 for 2 KV groups, expected a multiple of 2"),
        ({"query": shaped(2, 6, 4, 7)}, r"key: got shape .* expected \[2, keys, groups, 7\]"),
        ({"key": shaped(2, 5, 2, 8)}, "key: got 5 keys a row, expected at least 6"),
        ({"key": shaped(1, 6, 2, 8)}, "key: got shape"),
        ({"value": shaped(2, 6, 1, 3)}, r"value: got shape .* expected \[2, 6, 2, any\]"),
        ({"value": shaped(2, 6, 2, 3).double()}, "value: got torch.float64"),
        ({"query": shaped(2, 6, 4, 8).int()}, "expected a float dtype"),
        ({"block_size": 0}, "block_size: got 0, expected an integer of at least 1"),
        ({"num_selected": 0}, "num_selected: got 0"),
        ({"num_selected": 1.5}, "num_selected: got 1.5"),
        ({"query_chunk": 0}, "query_chunk: got 0"),
        ({"forced_first_blocks": -1}, "forced_first_blocks: got -1"),
        ({"forced_first_blocks": 2, "forced_recent_blocks": 1}, "at most num_selected = 2"),
        ({"cu_seqlens": offsets(0, 6, 12).long()}, "cu_seqlens: got torch.int64"),
        ({"cu_seqlens": offsets(0)}, r"cu_seqlens: got shape \[1\]"),
        ({"cu_seqlens": offsets(0, 6, 11)}, "expected ascending offsets from 0 to 12"),
        ({"cu_seqlens": offsets(0, 7, 6, 12)}, "expected ascending offsets from 0 to 12"),
        ({"cu_seqlens": offsets(0, 5, 12)}, "expected a document to start at token 6 too"),
        ({"backend": "cuda"}, "backend: got 'cuda', expected one of auto, reference, triton"),
    ],
)
def test_oracle_arguments(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        oracle_attention(**({**GOOD, "block_size": 2, "num_selected": 2} | changed))


INDICES = torch.zeros(2, 2, 6, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block_indices": INDICES.long()}, "expected torch.int32"),
        ({"block_indices": INDICES[:, :, :5]}, r"expected \[2, 2, 6, selected\]"),
        ({"block_indices": INDICES[0]}, r"expected \[2, 2, 6, selected\]"),
        ({"block_indices": INDICES + 3}, "got block 3, expected ids below 3"),
        ({"sink": shaped(2)}, r"sink: got shape \[2\], expected \[4\]"),
        ({"sink": shaped(4).int()}, "sink: got torch.int32"),
        ({"block_size": -1}, "block_size: got -1"),
    ],
)
def test_block_sparse_arguments(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**({**GOOD, "block_indices": INDICES, "block_size": 2} | changed))


def test_window_arguments() -> None:
    with pytest.raises(ValueError, match="window: got 0"):
        sliding_window_attention(**GOOD, window=0)
    with pytest.raises(ValueError, match="sink: got shape"):
        sliding_window_attention(**GOOD, window=1, sink=shaped(4, 1))


def test_topk_arguments() -> None:
    with pytest.raises(ValueError, match=r"scores: got torch\.int64"):
        block_topk(torch.zeros(3, dtype=torch.long), 2)
    with pytest.raises(ValueError, match="num_selected: got 0"):
        block_topk(torch.zeros(3), 0)


def test_backends() -> None:
    assert resolve_backend("reference", "cpu").name == "reference"
    choice = resolve_backend("auto", torch.device("cpu"))
    assert choice.name == "reference"
    assert "need a CUDA device" in choice.reason
    assert resolve_backend("triton", "cuda").name == "triton"
    for refused, why in (
        ({"device": "cpu"}, "need a CUDA device"),
        ({"device": "cuda", "dtype": torch.float32}, "bf16 and fp16"),
        ({"device": "cuda", "head_dim": 512}, "head dims up to 256"),
        ({"device": "cuda", "block_size": 48}, "block sizes"),
    ):
        assert resolve_backend("auto", **refused).name == "reference"
        with pytest.raises(BackendUnavailable, match=why):
            resolve_backend("triton", **refused)
    with pytest.raises(BackendUnavailable):
        sliding_window_attention(**GOOD, window=1, backend="triton")
