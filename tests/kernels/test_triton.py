"""The Triton kernels, on a GPU if there is one and in Triton's interpreter otherwise."""

import os
import subprocess
import sys

import pytest
import torch


@pytest.mark.thorough
@pytest.mark.parametrize("cases", ["triton_cases", "gating_cases", "decode_cases", "prefill_cases"])
def test_triton_kernels_agree_with_the_reference(cases: str, seed: int) -> None:
    # A process of its own: the interpreter is chosen when the kernels are imported.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "kernels"])}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    result = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{cases}", str(seed)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, f"seed {seed}\n{result.stdout}\n{result.stderr[-4000:]}"
