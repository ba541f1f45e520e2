"""HySparse on Megatron-core: full-attention oracles select and share, sparse layers reuse."""

__version__ = "0.1.0"
