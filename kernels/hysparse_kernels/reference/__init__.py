"""The specification: plain PyTorch on any device."""
