"""The kinds of layers."""

from enum import Enum


class LayerKind(Enum):
    """What a layer's attention is; the value is its letter in a layout."""

    FULL = "F"
    SPARSE = "S"
    WINDOW = "W"


class GateKind(Enum):
    """Granularity of the two sigmoid gates of a sparse layer."""

    head = "head"
    channel = "channel"


class FullGate(Enum):
    """Sigmoid gate on the output of a full-attention layer (gated attention)."""

    none = "none"
    head = "head"
    channel = "channel"


class SinkKind(Enum):
    """The learnable extra logit in the softmax of a sparse layer's two branches."""

    branch = "branch"
    shared = "shared"
    none = "none"
