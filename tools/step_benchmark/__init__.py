"""The parts of `python -m tools.benchmark_step`."""
