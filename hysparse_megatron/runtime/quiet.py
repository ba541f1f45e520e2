"""What libraries say at import, left out of the output of our commands. Imports no torch."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Hide what libraries say at import on every rank; HYSPARSE_VERBOSE=1 shows it."""
    if os.environ.get("HYSPARSE_VERBOSE") == "1":
        return
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost store, told in our own words
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch.profiler's search for GPUs on a CPU
    for name in ("megatron", "torch.utils.cpp_extension", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
