"""Kernels for Hopper GPUs in Gluon; for what they refuse the portable ones of triton/ run."""
