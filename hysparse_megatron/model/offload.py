"""Activations that wait for their backward pass in host memory: `train.offload_activations`.

What autograd saves of a layer is copied to the host while the next layer computes, and back while
the backward pass of the layer after it does: two streams of their own, one layer in each direction
on its way. A storage is copied once however many save it, such as an oracle's key and value with
all their readers, and as a whole, which is what autograd would keep. On a CPU the same happens with
memory of its own, so that tests see it.

megatron-core's fine-grained offloading takes a module's input by the module's name, counts on the
same number of micro-batches in every step, copies what is saved twice twice, and needs a GPU.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, UntypedStorage


class Keep(Protocol):
    """How what autograd saves is kept, for hooks that stand inside of others."""

    def pack(self, tensor: Tensor) -> Any:
        """What to keep in place of `tensor`."""

    def unpack(self, packed: Any) -> Tensor:
        """The tensor that was packed, in the backward pass."""

    def layer(self) -> AbstractContextManager[object]:
        """Within, autograd saves what one layer computes."""


class _OnDevice:
    """Where it is."""

    def pack(self, tensor: Tensor) -> Tensor:
        return tensor.detach()  # itself, an output would hold what holds it

    def unpack(self, packed: Tensor) -> Tensor:
        return packed

    def layer(self) -> AbstractContextManager[object]:
        return nullcontext()


ON_DEVICE: Keep = _OnDevice()
"""As autograd keeps it by itself."""


class Offload:
    """Host memory and streams of a rank, for all its model chunks."""

    def __init__(self, min_bytes: int) -> None:
        """Storages of fewer bytes than `min_bytes` stay on the device."""
        self._min_bytes = max(min_bytes, 1)
        self._link: _Link | None = None

    @property
    def copied_bytes(self) -> tuple[int, int]:
        """To the host and back, so far."""
        return (0, 0) if self._link is None else (self._link.bytes_out, self._link.bytes_back)

    @property
    def host_bytes(self) -> int:
        """Host memory that is held."""
        return 0 if self._link is None else self._link.buffers.allocated_bytes

    @contextlib.contextmanager
    def forward_pass(self, device: torch.device, stay: Iterable[Tensor]) -> Iterator[Keep]:
        """How one forward pass of a chunk keeps its layers.

        What has its storage with one of `stay`, such as parameters, stays on the device.
        """
        if self._link is None:
            self._link = _Link(device)
        keeping = _ForwardPass(self._link, self._min_bytes, device)
        for tensor in stay:
            keeping.stay.add(tensor.untyped_storage())
        try:
            yield keeping
        finally:
            keeping.last = None


def describe_offload(recompute: str, min_bytes: int) -> str:
    """For the start-up log."""
    smallest = f" of {min_bytes:,} bytes and more" if min_bytes > 1 else ""
    return (
        f"activations{smallest} wait for the backward pass in host memory (recompute {recompute}), "
        "but for those of the model's last layer"
    )


class _Buffers:
    """Host memory that is used again, pinned for a GPU.

    In powers of two, as PyTorch's allocator of pinned memory rounds up to them anyway: sizes that
    change from micro-batch to micro-batch, as those of experts do, find memory of those before.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._free: dict[int, list[Tensor]] = {}
        self.allocated_bytes = 0

    def take(self, size: int) -> Tensor:
        """uint8, of at least `size` bytes."""
        whole = host_bytes_of(size)
        free = self._free.setdefault(whole, [])
        if free:
            return free.pop()
        self.allocated_bytes += whole
        return torch.empty(whole, dtype=torch.uint8, pin_memory=self._pinned)

    def give(self, buffer: Tensor) -> None:
        """Back, once the stream that computes has waited for all copies of it."""
        self._free[buffer.numel()].append(buffer)


def host_bytes_of(size: int) -> int:
    """Bytes of host memory that hold `size` bytes."""
    return 1 << (size - 1).bit_length()


class _Piece:
    """One storage that was saved: its copy on the host, and where it is on the device if it is."""

    def __init__(self, storage: UntypedStorage, version: int, buffers: _Buffers) -> None:
        self.size, self.version = storage.nbytes(), version
        self.storage: Callable[[], UntypedStorage | None] = weakref.ref(storage)
        self.buffer = buffers.take(self.size)
        self._buffers = buffers

    def __del__(self) -> None:
        self._buffers.give(self.buffer)


@dataclass(eq=False)
class _Layer:
    """What one layer has saved in one forward pass."""

    before: _Layer | None
    """The last layer before that has saved anything."""
    pieces: list[_Piece] = field(default_factory=list)
    held: list[UntypedStorage] = field(default_factory=list)
    """Those on the device, while a copy reads or writes them and until its backward pass is over:
    memory is free for others only once the stream that computes has waited for its copies."""
    copied: Any = None
    """Event after the copies to the host."""
    fetched: Any = None
    """Event after the copies back, those of what is shared with layers behind it too."""
    stage: int = 0
    """0 in its forward pass, then 1; 2 after a layer's backward pass has begun beside its copies to
    the host; 3 since its own has."""

    def add(self, piece: _Piece, storage: UntypedStorage) -> None:
        if piece not in self.pieces:
            self.pieces.append(piece)
            self.held.append(storage)


class _Saved(NamedTuple):
    """A tensor that was saved."""

    piece: _Piece
    layer: _Layer
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _ForwardPass:
    """A `Keep` that copies to the host."""

    def __init__(self, link: _Link, min_bytes: int, device: torch.device) -> None:
        self._link, self._min_bytes, self._device = link, min_bytes, device
        self._pieces: weakref.WeakKeyDictionary[UntypedStorage, weakref.ref[_Piece]] = (
            weakref.WeakKeyDictionary()
        )
        self._layer: _Layer | None = None
        self.stay: weakref.WeakSet[UntypedStorage] = weakref.WeakSet()
        self.last: _Layer | None = None

    @contextlib.contextmanager
    def layer(self) -> Iterator[None]:
        self._layer = layer = _Layer(self.last)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                yield
        finally:
            self._layer = None
        if layer.pieces:
            self.last = layer
        self._link.leave(layer)

    def pack(self, tensor: Tensor) -> Tensor | _Saved:
        storage, layer = tensor.untyped_storage(), self._layer
        small = storage.nbytes() < self._min_bytes
        if layer is None or small or tensor.device != self._device or storage in self.stay:
            return tensor.detach()
        version = tensor._version
        known = self._pieces.get(storage)
        piece = None if known is None else known()
        if piece is not None and piece.version != version:
            piece.storage = _gone
            piece = None
        if piece is None:
            piece = self._link.copy_out(storage, version)
            self._pieces[storage] = weakref.ref(piece)
        layer.add(piece, storage)
        offset = int(tensor.storage_offset())
        return _Saved(piece, layer, tensor.dtype, tensor.size(), tensor.stride(), offset)

    def unpack(self, packed: Tensor | _Saved) -> Tensor:
        if not isinstance(packed, _Saved):
            return packed
        storage = self._link.arrive(packed.layer, packed.piece)
        whole = torch.empty(0, dtype=packed.dtype, device=storage.device)
        return whole.set_(storage, packed.offset, packed.size, packed.stride)


class _Link:
    """The way between a device and its host, and the layers that are on it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)
        self._out, self._back = self._module.Stream(), self._module.Stream()
        self._present: list[_Layer] = []
        """Those that hold memory of the device."""
        self._fetched: Any = None
        """Event after all copies back so far."""
        self.buffers = _Buffers(pinned=device.type == "cuda")
        self.bytes_out = self.bytes_back = 0

    def copy_out(self, storage: UntypedStorage, version: int) -> _Piece:
        """Start to copy what the stream of now has written or is going to."""
        piece = _Piece(storage, version, self.buffers)
        self._out.wait_stream(self._module.current_stream())
        with self._module.stream(self._out):
            piece.buffer[: piece.size].copy_(_bytes_of(storage), non_blocking=True)
        self.bytes_out += piece.size
        return piece

    def leave(self, layer: _Layer) -> None:
        """A layer's forward pass is over: from now on the memory of those before is free."""
        for other in self._present:
            self._release(other)
        layer.copied, layer.stage = self._out.record_event(), 1
        self._present = [layer]

    def arrive(self, layer: _Layer, piece: _Piece) -> UntypedStorage:
        """The storage of a piece of a layer whose backward pass has begun, or begins with this."""
        if layer.stage < 3 or layer not in self._present:
            self._begin_backward(layer)
        storage = piece.storage()
        assert storage is not None, "what a layer holds is on the device"
        return storage

    def _begin_backward(self, layer: _Layer) -> None:
        """Wait for what the layer has saved, and fetch what the one before it has."""
        layer.stage = 3
        still = []
        for other in self._present:
            if other in (layer, layer.before) or other.stage == 1:
                still.append(other)
            else:
                self._release(other)
            if other.stage == 1:
                other.stage = 2
        self._present = still
        self._fetch(layer)
        if layer.fetched is not None:
            self._module.current_stream().wait_event(layer.fetched)
        if layer.before is not None:
            self._fetch(layer.before)

    def _fetch(self, layer: _Layer) -> None:
        """Start to bring all that a layer has saved to the device."""
        if layer not in self._present:
            self._present.append(layer)
        brought: list[tuple[_Piece, Tensor]] = []
        held = []
        for piece in layer.pieces:
            storage = piece.storage()
            if storage is None:
                tensor = torch.empty(piece.size, dtype=torch.uint8, device=self._device)
                brought.append((piece, tensor))
                storage = tensor.untyped_storage()
                piece.storage = weakref.ref(storage)
            held.append(storage)
        # What is replaced has changed since it was copied, which holds it elsewhere.
        layer.held = held
        if brought:
            self._back.wait_stream(self._module.current_stream())
            self._back.wait_event(layer.copied)
            with self._module.stream(self._back):
                for piece, tensor in brought:
                    tensor.copy_(piece.buffer[: piece.size], non_blocking=True)
                    self.bytes_back += piece.size
            self._fetched = self._back.record_event()
        layer.fetched = self._fetched

    def _release(self, layer: _Layer) -> None:
        """Let go of its memory on the device, which the stream of now may use for others."""
        for event in (layer.copied, layer.fetched):
            if event is not None:
                self._module.current_stream().wait_event(event)
        layer.held.clear()


def _gone() -> None:
    """Where on the device something is that has changed since."""


def _bytes_of(storage: UntypedStorage) -> Tensor:
    """All of a storage as uint8."""
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return whole.set_(storage, 0, (storage.nbytes(),), (1,))
