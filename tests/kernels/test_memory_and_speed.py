"""Memory grows with S and not with S x S, and 4096 tokens are quick on a CPU."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hysparse_kernels import block_sparse_attention, oracle_attention, sliding_window_attention
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def oracle(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return oracle_attention(query, key, value, block_size=64, num_selected=4).output


def block_sparse(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, length, groups, _ = key.shape
    own = torch.arange(length).view(1, 1, length, 1) // 64
    indices = (own - torch.arange(4)).clamp_min(-1).expand(batch, groups, -1, -1)
    return block_sparse_attention(query, key, value, indices.int(), block_size=64)


def window(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return sliding_window_attention(query, key, value, window=128)


def small_heads(length: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((4, 32), (1, 32), (1, 32))
    query, key, value = (
        torch.randn(1, length, heads, dim, requires_grad=True) for heads, dim in shapes
    )
    return query, key, value


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.nbytes = max([self.nbytes, *sizes])
        return result


def measure(attend: Attend, length: int) -> tuple[int, int, int]:
    """Bytes saved for backward, then of the largest tensor in the forward and the backward."""
    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    inputs = small_heads(length)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        LargestTensor() as forward,
    ):
        output = attend(*inputs)
    grad_output = torch.ones_like(output)
    with LargestTensor() as backward:
        output.backward(grad_output)
    return saved, forward.nbytes, backward.nbytes


@pytest.mark.parametrize("attend", [oracle, block_sparse, window])
def test_memory_is_linear_in_sequence_length(attend: Attend, seed: int) -> None:
    short, long = measure(attend, 1024), measure(attend, 2048)
    print(f"saved, forward, backward bytes: {short} -> {long}")
    assert min(short) > 0
    assert all(after / before < 2.6 for before, after in zip(short, long, strict=True))
    query, key, value = small_heads(2048)
    inputs_bytes = query.nbytes + key.nbytes + value.nbytes
    assert long[0] < 1.5 * inputs_bytes


@pytest.mark.parametrize("attend", [oracle, block_sparse, window])
def test_4096_tokens_take_seconds(attend: Attend, seed: int) -> None:
    inputs = small_heads(4096)
    began = time.process_time()
    attend(*inputs).sum().backward()
    # About 0.5 s on two idle cores; the limit leaves room for busy ones.
    assert time.process_time() - began < 20
