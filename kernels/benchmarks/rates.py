"""What this device can do at best: measured copy and matmul rates, and floors made from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hysparse_kernels.benchmarking.timer import Timer


@dataclass(frozen=True)
class Rates:
    """Bounds of the device. Floors use `peak_tflops` and `bandwidth_tbs`."""

    peak_tflops: float
    """Dense bf16 rate that floors assume; the best sustained rate of Hopper, not measured here."""
    matmul_tflops: float
    """Measured: a square bf16 matrix product."""
    bandwidth_tbs: float
    """Measured: bytes read plus bytes written by a copy, in TB/s."""

    @classmethod
    def measure(cls, timer: Timer, peak_tflops: float, size: int) -> Rates:
        """Time a product of two size x size matrices and a copy of size x size x 8 bytes."""
        device = timer.device
        a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        product_ms = timer.measure(lambda: a @ b).median_ms
        source = torch.zeros(size * size, device=device, dtype=torch.int64)
        target = torch.empty_like(source)
        copy_ms = timer.measure(lambda: target.copy_(source)).median_ms
        return cls(peak_tflops, 2e-9 * size**3 / product_ms, 2e-9 * source.nbytes / copy_ms)

    def floor_ms(self, flops: float, num_bytes: float) -> float:
        """The longer of computing at the peak and moving every byte once."""
        return max(1e-9 * flops / self.peak_tflops, 1e-9 * num_bytes / self.bandwidth_tbs)

    def __str__(self) -> str:
        return (
            f"measured: matmul {self.matmul_tflops:.0f} TF/s bf16, copy "
            f"{self.bandwidth_tbs:.2f} TB/s; floors: {self.peak_tflops:.0f} TF/s and that copy"
        )
