"""HySparse on Megatron-core: full-attention oracles select and share, sparse layers reuse."""

from pathlib import Path

from hysparse_kernels import __version__

__all__ = ["__version__"]

if not (Path(__file__).parent / "tools").is_dir():
    # A checkout: `tools` and `launch` stand beside the package. Installed, they are inside.
    __path__.append(str(Path(__file__).parent.parent))
