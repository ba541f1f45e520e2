"""Kernels that only a GPU runs, compiled for one without it."""

import os
import sys

import pytest

from tests.captured import captured, import_path


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kernels", "number"),
    [("triton_compiles", 82), ("hopper_compiles", 48), ("decode_compiles", 238)],
)
def test_kernels_compile_without_a_gpu(kernels: str, number: int) -> None:
    environment = {**os.environ, "PYTHONPATH": import_path(".", "kernels")}
    environment.pop("TRITON_INTERPRET", None)
    result = captured(
        [sys.executable, "-m", f"tests.kernels.{kernels}"], env=environment, timeout=500
    )
    assert f"{number} compiled" in result.stdout
