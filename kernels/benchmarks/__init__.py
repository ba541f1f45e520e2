"""Time the attention operations beside their peers: `cd kernels && python -m benchmarks --help`."""
