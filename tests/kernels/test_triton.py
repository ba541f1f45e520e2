"""The Triton kernels, on a GPU if there is one and in Triton's interpreter otherwise."""

import os
import sys

import pytest
import torch

from tests.captured import captured, import_path


@pytest.mark.thorough
@pytest.mark.parametrize("cases", ["triton_cases", "gating_cases", "decode_cases", "prefill_cases"])
def test_triton_kernels_agree_with_the_reference(cases: str, seed: int) -> None:
    # A process of its own: the interpreter is chosen when the kernels are imported.
    environment = {**os.environ, "PYTHONPATH": import_path(".", "kernels")}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "tests.kernels.interpreter", cases, str(seed)]
    captured(command, env=environment, timeout=300)
