"""What all benchmarks share: problems, selections, timing, targets, reports."""
